// The arena: pages that peers map, handed out, given back, and not shared with forked children by accident.
#include "transport/arena.h"

#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <random>
#include <vector>

#include "check.h"

using namespace paracomm;

namespace {

constexpr size_t kGrain = 64 * 1024;

bool is_zero(const void* p, size_t nbytes) {
  const auto* bytes = static_cast<const unsigned char*>(p);
  return std::all_of(bytes, bytes + nbytes, [](unsigned char b) { return b == 0; });
}

void test_zeroed_and_aligned() {
  Arena& arena = Arena::process();
  CHECK_EQ(arena.bytes_in_use(), size_t{0});
  auto* a = static_cast<unsigned char*>(arena.allocate(100'000));
  void* const empty = arena.allocate(0);
  CHECK(empty != nullptr && empty != a);
  CHECK_EQ(reinterpret_cast<uintptr_t>(a) % 4096, uintptr_t{0});
  CHECK(is_zero(a, 100'000));
  CHECK(arena.contains(a, 100'000));
  CHECK(!arena.contains(&arena, 1));
  CHECK(!arena.contains(a, arena.mapping().size() + 1));
  std::fill(a, a + 100'000, static_cast<unsigned char>(7));
  CHECK_EQ(arena.bytes_in_use(), 3 * kGrain);
  arena.release(a);
  auto* again = static_cast<unsigned char*>(arena.allocate(100'000));
  CHECK(again == a);
  CHECK(is_zero(again, 100'000));  // the pages went back to the system
  arena.release(again);
  arena.release(empty);
  int elsewhere = 0;
  arena.release(&elsewhere);
  arena.release(again);  // a second time: nothing
  CHECK_EQ(arena.bytes_in_use(), size_t{0});
}

/// Neighbours that are free become one, whatever the order in which they come back.
void test_no_fragments_are_left() {
  Arena& arena = Arena::process();
  std::mt19937 random(1);
  void* const base = arena.allocate(1);
  arena.release(base);
  for (int round = 0; round < 20; ++round) {
    std::vector<void*> blocks;
    for (int i = 0; i < 50; ++i) blocks.push_back(arena.allocate(random() % (4 * kGrain) + 1));
    std::sort(blocks.begin(), blocks.end());
    CHECK(std::adjacent_find(blocks.begin(), blocks.end()) == blocks.end());
    std::shuffle(blocks.begin(), blocks.end(), random);
    for (void* p : blocks) arena.release(p);
    CHECK_EQ(arena.bytes_in_use(), size_t{0});
    void* const whole = arena.allocate(arena.mapping().size() / 2);
    CHECK(whole == base);
    arena.release(whole);
  }
}

void test_full() {
  Arena& arena = Arena::process();
  CHECK_THROWS(arena.allocate(arena.mapping().size() + 1), ErrorKind::error, "arena: no ");
  CHECK_EQ(arena.bytes_in_use(), size_t{0});
}

void test_a_file_is_mapped_once() {
  Fd file = make_memfd("test", 8192);
  Fd twin(::dup(file.get())), later(::dup(file.get()));
  auto first = map_shared(std::move(file));
  CHECK(map_shared(std::move(twin)) == first);
  first->data()[5000] = std::byte{3};
  CHECK(first->contains(first->data() + 8191, 1));
  CHECK(!first->contains(first->data() + 8191, 2));
  first.reset();
  CHECK(map_shared(std::move(later))->data()[5000] == std::byte{3});
}

/// A child sees its parent's bytes, leaves them alone when it lets go of them, and has an arena of its own.
void test_forked_child() {
  Arena& arena = Arena::process();
  auto* p = static_cast<unsigned char*>(arena.allocate(1000));
  p[0] = 9;
  const pid_t child = ::fork();
  if (child == 0) {
    CHECK_EQ(int{p[0]}, 9);
    arena.release(p);
    Arena::process().release(p);
    CHECK_EQ(int{p[0]}, 9);
    CHECK(&Arena::process() != &arena);
    CHECK_EQ(Arena::process().bytes_in_use(), size_t{0});
    auto* own = static_cast<unsigned char*>(Arena::process().allocate(1000));
    CHECK(!arena.contains(own, 1));
    own[0] = 1;
    CHECK_THROWS(arena.allocate(1), ErrorKind::error, "forked child");
    ::_exit(0);
  }
  int status = -1;
  CHECK_EQ(::waitpid(child, &status, 0), child);
  CHECK_EQ(status, 0);
  CHECK_EQ(int{p[0]}, 9);
  arena.release(p);
}

}  // namespace

int main() {
  test_zeroed_and_aligned();
  test_no_fragments_are_left();
  test_full();
  test_a_file_is_mapped_once();
  test_forked_child();
}
