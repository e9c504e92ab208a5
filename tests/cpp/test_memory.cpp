// The shared-memory transport between threads, between mappings in one process, and between processes.
#include "transport/memory.h"

#include <sched.h>
#include <unistd.h>

#include <atomic>
#include <cstring>
#include <deque>
#include <functional>
#include <random>
#include <thread>

#include "core/limits.h"
#include "ranks.h"

using namespace paracomm;
using namespace paracomm_test;
using namespace std::chrono_literals;

namespace {

constexpr auto kLong = std::chrono::microseconds(600s);  // a wake-up that is lost hangs the test
constexpr size_t kDepth = kQueueDepth;

Signature signature_of(uint64_t count) {
  Signature signature;
  signature.sequence = 7;
  signature.collective = Collective::all_reduce;
  signature.count = count;
  return signature;
}
const Signature kSignature = signature_of(1);

using Endpoints = std::vector<std::unique_ptr<MemoryEndpoint>>;

std::shared_ptr<Mapping> map_own_arena() { return map_shared(Fd(::dup(Arena::process().mapping().fd()))); }

MemoryPeer peer_of(int rank, std::shared_ptr<Segment> segment, std::shared_ptr<Mapping> arena) {
  MemoryPeer peer;
  peer.rank = peer.local_rank = rank;
  peer.segment = std::move(segment);
  peer.arena = std::move(arena);
  return peer;
}

MemoryOptions options_of(size_t staging_bytes) {
  MemoryOptions options;
  options.staging_bytes = staging_bytes;
  return options;
}

/// All ranks' endpoints in this process. shared: each has mappings of its own of the others' segments.
Endpoints make_world(int n, bool shared, size_t staging_bytes = 64 * 1024) {
  const MemoryOptions options = options_of(staging_bytes);
  std::vector<std::shared_ptr<Segment>> segments;
  for (int r = 0; r < n; ++r) segments.push_back(std::make_shared<Segment>(n, options, shared));
  Endpoints world;
  for (int r = 0; r < n; ++r) {
    std::vector<MemoryPeer> peers;
    for (int p = 0; p < n; ++p) {
      if (p == r) continue;
      auto segment = segments[static_cast<size_t>(p)];
      if (shared) segment = std::make_shared<Segment>(n, options, Fd(::dup(segment->fd())));
      peers.push_back(peer_of(p, std::move(segment), shared ? map_own_arena() : nullptr));
    }
    world.push_back(std::make_unique<MemoryEndpoint>(peer_of(r, segments[static_cast<size_t>(r)], nullptr),
                                                     std::move(peers), n, options));
  }
  return world;
}

std::byte byte_of(uint64_t message, size_t at) { return static_cast<std::byte>((message * 37 + at * 11 + at / 253)); }

void fill(std::byte* to, uint64_t message, size_t nbytes) {
  for (size_t i = 0; i < nbytes; ++i) to[i] = byte_of(message, i);
}
bool holds(const std::byte* bytes, uint64_t message, size_t nbytes) {
  for (size_t i = 0; i < nbytes; ++i)
    if (bytes[i] != byte_of(message, i)) return false;
  return true;
}

/// Tries until it gives something, asleep in between.
template <class Attempt>
auto until(Endpoint& endpoint, int peer, Attempt attempt) {
  for (;;) {
    if (auto result = attempt()) return result;
    endpoint.wait(peer, kLong);
  }
}

void test_names_and_places() {
  const Endpoints local = make_world(2, false), shm = make_world(2, true);
  std::byte here[64];
  CHECK_EQ(std::string(local[0]->name()), "local");
  CHECK_EQ(std::string(shm[0]->name()), "shm");
  CHECK(local[0]->stages() && !local[0]->progress());
  CHECK(local[0]->sends_in_place(here, 64));
  CHECK(!shm[0]->sends_in_place(here, 33));
  CHECK(shm[0]->sends_in_place(here, 32));
  void* mapped = Arena::process().allocate(100);
  CHECK(shm[0]->sends_in_place(static_cast<std::byte*>(mapped), 100));
  Arena::process().release(mapped);
}

void test_queue_is_full_and_wraps(bool shared) {
  const Endpoints world = make_world(2, shared);
  std::byte payload[32];
  uint64_t index = 0, sent = 0, received = 0;
  auto send = [&] {
    fill(payload, sent, sent % 33);
    if (!world[0]->try_send(1, kSignature, payload, sent % 33, index)) return false;
    CHECK_EQ(index, sent);
    CHECK(world[0]->sent(1, index));
    ++sent;
    return true;
  };
  for (int round = 0; round < 300; ++round) {
    while (send()) CHECK(sent - received <= kDepth);
    CHECK_EQ(sent - received, kDepth);
    for (int i = 0; i <= round % 64; ++i) {
      const std::byte* got = world[1]->try_recv(0, kSignature, received % 33, nullptr);
      CHECK(got != nullptr && holds(got, received, received % 33));
      world[1]->release(0);
      ++received;
    }
  }
  while (received < sent) {
    CHECK(world[1]->try_recv(0, kSignature, received++ % 33, nullptr) != nullptr);
    world[1]->release(0);
  }
  CHECK(world[1]->try_recv(0, kSignature, 0, nullptr) == nullptr);
}

/// Random sizes, random readers, random delay of releases: what is read is what was written.
void test_staging_wraps(bool shared) {
  struct Unread {
    uint64_t message;
    size_t nbytes;
  };
  std::mt19937 random(4711);
  const Endpoints world = make_world(4, shared, 8192);
  std::deque<Unread> unread[4];
  uint64_t refused = 0, index = 0;
  for (uint64_t message = 0; message < 20'000;) {
    const size_t nbytes = random() % (random() % 4 == 0 ? 6000 : 300);
    if (std::byte* staged = world[0]->try_reserve(nbytes)) {
      fill(staged, message, nbytes);
      const uint32_t readers = random() % 8;  // none at all is fine, too
      for (int peer = 1; peer < 4; ++peer) {
        if ((readers >> (peer - 1) & 1) == 0) continue;
        if (world[0]->try_send(peer, kSignature, staged, nbytes, index)) unread[peer].push_back({message, nbytes});
      }
      ++message;
    } else {
      ++refused;
    }
    const auto peer = static_cast<size_t>(random() % 3 + 1);
    for (size_t n = random() % 6; n > 0 && !unread[peer].empty(); --n) {
      const auto [number, size] = unread[peer].front();
      unread[peer].pop_front();
      const std::byte* got = world[peer]->try_recv(0, kSignature, size, nullptr);
      CHECK(got != nullptr && holds(got, number, size));
      world[peer]->release(0);
    }
  }
  CHECK(refused > 0);
}

void test_staging_is_freed_by_the_last_reader() {
  const Endpoints world = make_world(3, false, 1024);
  uint64_t index = 0;
  std::byte* staged = world[0]->try_reserve(1000);
  CHECK(staged != nullptr);
  CHECK(world[0]->try_send(1, kSignature, staged, 1000, index));
  CHECK(world[0]->try_send(2, kSignature, staged, 1000, index));
  CHECK(world[0]->try_reserve(64) == nullptr);
  CHECK(world[1]->try_recv(0, kSignature, 1000, nullptr) != nullptr);
  world[1]->release(0);
  CHECK(world[0]->try_reserve(64) == nullptr);
  CHECK(world[2]->try_recv(0, kSignature, 1000, nullptr) != nullptr);
  CHECK(world[0]->try_reserve(64) == nullptr);
  world[2]->release(0);
  CHECK(world[0]->try_reserve(1024) != nullptr);
  CHECK_THROWS(world[0]->try_reserve(1025), ErrorKind::error, "does not fit the staging ring of 1024");
}

/// Several messages may be taken before the first is released.
void test_takes_ahead() {
  const Endpoints world = make_world(2, false);
  std::byte payload[8] = {};
  uint64_t index = 0;
  for (uint64_t m = 0; m < 3; ++m) {
    payload[0] = static_cast<std::byte>(m);
    CHECK(world[0]->try_send(1, kSignature, payload, 8, index));
  }
  for (uint64_t m = 0; m < 3; ++m) CHECK(world[1]->try_recv(0, kSignature, 8, nullptr)[0] == static_cast<std::byte>(m));
  for (int m = 0; m < 3; ++m) world[1]->release(0);
  CHECK_EQ(world[0]->bytes_sent(1), uint64_t{24});
}

void test_by_reference(bool shared) {
  const Endpoints world = make_world(2, shared);
  auto* memory = static_cast<std::byte*>(Arena::process().allocate(2 * 4096));
  fill(memory, 1, 4096);
  uint64_t first = 0, second = 0;
  CHECK(world[0]->try_send(1, kSignature, memory, 4096, first));
  CHECK(world[0]->try_send(1, kSignature, memory, 8, second));
  CHECK(!world[0]->sent(1, first));
  const std::byte* got = world[1]->try_recv(0, kSignature, 4096, nullptr);
  CHECK(got != nullptr && holds(got, 1, 4096));
  CHECK((got == memory) == !shared);
  CHECK(!world[0]->sent(1, first));
  world[1]->release(0);
  CHECK(world[0]->sent(1, first));
  CHECK(world[0]->sent(1, second));
  Arena::process().release(memory);
}

/// A peer's output is known once a message of the collective came from its mapped memory, and forgotten with the next.
void test_writes_into_a_peers_output(bool shared) {
  const Endpoints world = make_world(2, shared);
  auto* memory = static_cast<std::byte*>(Arena::process().allocate(2 * 4096));
  std::byte* const output = memory + 4096;
  uint64_t index = 0;
  for (const auto& endpoint : world) endpoint->begin(nullptr);
  world[0]->begin(output);
  CHECK(world[1]->peer_output(0) == nullptr);
  CHECK(world[0]->try_send(1, kSignature, memory, 4096, index));
  CHECK(world[1]->try_recv(0, kSignature, 4096, nullptr) != nullptr);
  world[1]->release(0);
  std::byte* const there = world[1]->peer_output(0);
  CHECK(there != nullptr);
  fill(there, 5, 4096);
  CHECK(world[1]->try_send(0, kSignature, there, 4096, index));
  if (shared) CHECK(world[1]->sent(0, index));  // nobody needs memory of rank 1 for that
  const std::byte* got = world[0]->try_recv(1, kSignature, 4096, output);
  CHECK(got == output && holds(output, 5, 4096));
  world[0]->release(1);
  CHECK(world[0]->peer_output(1) == nullptr);
  world[1]->begin(nullptr);
  CHECK(world[1]->peer_output(0) == nullptr);
  Arena::process().release(memory);
}

void test_mismatch() {
  const Endpoints world = make_world(2, false);
  std::byte payload[64] = {};
  uint64_t index = 0;
  CHECK(world[0]->try_send(1, signature_of(3), payload, 12, index));
  CHECK(world[0]->try_send(1, kSignature, payload, 64, index));
  CHECK_THROWS(world[1]->try_recv(0, signature_of(4), 16, nullptr), ErrorKind::mismatch, "rank 0 is in all_reduce #7");
  CHECK_THROWS(world[1]->try_recv(0, signature_of(4), 16, nullptr), ErrorKind::mismatch, "count");
  CHECK_THROWS(world[1]->try_recv(0, signature_of(3), 16, nullptr), ErrorKind::mismatch, "12 bytes, expected 16");
  CHECK(world[1]->try_recv(0, signature_of(3), 12, nullptr) != nullptr);
  world[1]->release(0);
  CHECK_THROWS(world[1]->try_recv(0, kSignature, 32, nullptr), ErrorKind::mismatch, "64 bytes, expected 32");
}

void test_segment_of_another_size() {
  const Segment own(2, options_of(4096), true);
  CHECK_THROWS(Segment(2, options_of(8192), Fd(::dup(own.fd()))), ErrorKind::mismatch, "segment has");
  CHECK_THROWS(Segment(3, options_of(4096), Fd(::dup(own.fd()))), ErrorKind::mismatch, "same version");
}

/// A rank's side of an exchange in which everybody sleeps whenever there is nothing to do.
void exchange(Endpoint& endpoint, int rank, int world_size, uint64_t rounds) {
  std::vector<std::byte> source(2048);
  uint64_t index = 0;
  for (uint64_t m = 0; m < rounds; ++m) {
    const size_t nbytes = m % 3 == 0 ? 16 : 64 + m * 97 % 1900;
    const uint64_t mine = m * 8 + static_cast<uint64_t>(rank);
    if (!endpoint.sends_in_place(source.data(), nbytes)) {
      std::byte* staged = until(endpoint, (rank + 1) % world_size, [&] { return endpoint.try_reserve(nbytes); });
      fill(staged, mine, nbytes);
      for (int peer = 0; peer < world_size; ++peer)
        if (peer != rank)
          until(endpoint, peer, [&] { return endpoint.try_send(peer, kSignature, staged, nbytes, index); });
    } else {
      fill(source.data(), mine, nbytes);
      for (int peer = 0; peer < world_size; ++peer)
        if (peer != rank)
          until(endpoint, peer, [&] { return endpoint.try_send(peer, kSignature, source.data(), nbytes, index); });
    }
    for (int peer = 0; peer < world_size; ++peer) {
      if (peer == rank) continue;
      const std::byte* got =
          until(endpoint, peer, [&] { return endpoint.try_recv(peer, kSignature, nbytes, nullptr); });
      CHECK(holds(got, m * 8 + static_cast<uint64_t>(peer), nbytes));
      endpoint.release(peer);
    }
    for (int peer = 0; peer < world_size; ++peer)
      if (peer != rank) until(endpoint, peer, [&] { return endpoint.sent(peer, index); });
  }
}

/// One rank sends as fast as it can, the other reads: both ends of a full queue and of a full ring sleep and wake.
void stream(Endpoint& endpoint, bool sends, uint64_t messages) {
  std::vector<std::byte> source(256);
  uint64_t index = 0;
  for (uint64_t m = 0; m < messages; ++m) {
    const size_t nbytes = m / 1000 % 2 == 0 ? m % 33 : 200 + m % 50;
    if (!sends) {
      const std::byte* got = until(endpoint, 0, [&] { return endpoint.try_recv(0, kSignature, nbytes, nullptr); });
      CHECK(holds(got, m, nbytes));
      endpoint.release(0);
      continue;
    }
    std::byte* data = source.data();
    if (nbytes > 32) data = until(endpoint, 1, [&] { return endpoint.try_reserve(nbytes); });
    fill(data, m, nbytes);
    until(endpoint, 1, [&] { return endpoint.try_send(1, kSignature, data, nbytes, index); });
  }
}

void test_threads_sleep_and_wake(bool shared) {
  for (const int n : {2, 4}) {
    const Endpoints world = make_world(n, shared, 8192);
    run_threads(n, [&](int rank) { exchange(*world[static_cast<size_t>(rank)], rank, n, 1000); });
  }
  const Endpoints world = make_world(2, shared, 4096);
  run_threads(2, [&](int rank) { stream(*world[static_cast<size_t>(rank)], rank == 0, 10'000); });
}

void test_processes_sleep_and_wake() {
  for (const int n : {2, 3}) {
    // Forked children close the descriptors that they inherit, so these stay open past the fork by other means.
    const MemoryOptions options = options_of(8192);
    std::vector<int> fds;
    for (int r = 0; r < n; ++r) fds.push_back(::dup(Segment(n, options, true).fd()));
    run_processes(n, [&](const Process& process) {
      std::vector<MemoryPeer> peers;
      std::shared_ptr<Segment> own;
      std::vector<std::shared_ptr<Segment>> all;
      for (int r = 0; r < n; ++r) all.push_back(std::make_shared<Segment>(n, options, Fd(fds[static_cast<size_t>(r)])));
      for (int r = 0; r < n; ++r)
        if (r != process.rank) peers.push_back(peer_of(r, all[static_cast<size_t>(r)], map_own_arena()));
      MemoryEndpoint endpoint(peer_of(process.rank, all[static_cast<size_t>(process.rank)], nullptr), std::move(peers),
                              n, options);
      exchange(endpoint, process.rank, n, 1000);
      if (n == 2) stream(endpoint, process.rank == 0, 10'000);
    });
    for (const int fd : fds) ::close(fd);
  }
}

void test_interrupt() {
  const Endpoints world = make_world(2, false);
  std::thread sleeper([&] {
    for (int i = 0; i < 3; ++i) world[0]->wait(1, kLong);  // the first arms, the second may sleep
    for (int i = 0; i < 100; ++i) world[0]->wait(1, kLong);
  });
  std::this_thread::sleep_for(20ms);
  world[0]->interrupt();
  sleeper.join();
}

/// Two ranks wait on one core, of which one may use others: it leaves, and may use as many as before.
void test_waiting_ranks_part() {
  cpu_set_t all, one;
  CHECK(sched_getaffinity(0, sizeof all, &all) == 0);
  if (CPU_COUNT(&all) < 2) return;
  const int core = sched_getcpu();
  CPU_ZERO(&one);
  CPU_SET(core, &one);
  CHECK(sched_setaffinity(0, sizeof one, &one) == 0);
  const Endpoints world = make_world(2, true);
  std::atomic<bool> parted{false};
  std::thread higher([&] {
    CHECK(sched_setaffinity(0, sizeof all, &all) == 0);
    while (sched_getcpu() == core) world[1]->yield(0);
    cpu_set_t now;
    CHECK(sched_getaffinity(0, sizeof now, &now) == 0 && CPU_EQUAL(&now, &all));
    parted = true;
  });
  while (!parted) world[0]->yield(1);
  higher.join();
  CHECK_EQ(sched_getcpu(), core);
  CHECK(sched_setaffinity(0, sizeof all, &all) == 0);
}

}  // namespace

int main() {
  test_processes_sleep_and_wake();
  test_names_and_places();
  for (const bool shared : {false, true}) {
    test_queue_is_full_and_wraps(shared);
    test_staging_wraps(shared);
    test_by_reference(shared);
    test_writes_into_a_peers_output(shared);
    test_threads_sleep_and_wake(shared);
  }
  test_staging_is_freed_by_the_last_reader();
  test_takes_ahead();
  test_mismatch();
  test_segment_of_another_size();
  test_interrupt();
  test_waiting_ranks_part();
}
