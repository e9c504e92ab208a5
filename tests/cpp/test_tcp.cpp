// The TCP endpoint: messages of all sizes arrive whole and in order, and what is wrong is said.
#include "transport/tcp.h"

#include <sys/socket.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <thread>
#include <utility>

#include "check.h"
#include "transport/socket_address.h"

using namespace paracomm;
using namespace std::chrono_literals;

namespace {

constexpr TcpOptions kOptions{.stripe_from = 1024};

std::pair<Fd, Fd> connected_pair(const char* ip) {
  SocketAddress address = *SocketAddress::parse_ip(ip, 0);
  const Fd listener = checked_fd(::socket(address.family(), SOCK_STREAM, 0), "socket");
  if (::bind(listener.get(), address.get(), address.length) != 0) return {};
  CHECK_EQ(::listen(listener.get(), 1), 0);
  address = SocketAddress::of_socket(listener);
  Fd caller = checked_fd(::socket(address.family(), SOCK_STREAM, 0), "socket");
  CHECK_EQ(::connect(caller.get(), address.get(), address.length), 0);
  return {checked_fd(::accept(listener.get(), nullptr, nullptr), "accept"), std::move(caller)};
}

/// Endpoints of ranks 0..n-1, all connected with `sockets` sockets each. Empty if there is no such address family.
std::vector<std::unique_ptr<TcpEndpoint>> make_world(int n, int sockets, const char* ip = "127.0.0.1", int buffer = 0) {
  std::vector<std::vector<TcpPeer>> peers(static_cast<size_t>(n));
  for (int low = 0; low < n; ++low) {
    for (int high = low + 1; high < n; ++high) {
      TcpPeer of_low{high, "host" + std::to_string(high), {}}, of_high{low, "host" + std::to_string(low), {}};
      for (int i = 0; i < sockets; ++i) {
        auto [a, b] = connected_pair(ip);
        if (!a) return {};
        for (const Fd* end : {&a, &b}) {
          if (buffer) set_option(*end, SOL_SOCKET, SO_SNDBUF, buffer);
        }
        of_low.sockets.push_back(std::move(a));
        of_high.sockets.push_back(std::move(b));
      }
      peers[static_cast<size_t>(low)].push_back(std::move(of_low));
      peers[static_cast<size_t>(high)].push_back(std::move(of_high));
    }
  }
  std::vector<std::unique_ptr<TcpEndpoint>> world;
  for (int rank = 0; rank < n; ++rank) {
    world.push_back(std::make_unique<TcpEndpoint>(rank, n, std::move(peers[static_cast<size_t>(rank)]), kOptions));
  }
  return world;
}

Signature signature_of(uint32_t sequence, size_t nbytes) {
  Signature signature;
  signature.sequence = sequence;
  signature.count = nbytes;
  signature.collective = Collective::all_reduce;
  return signature;
}

std::byte expected_byte(int src, size_t message, size_t at) {
  return static_cast<std::byte>((at * 31 + at / 251 + message * 17 + static_cast<size_t>(src) * 101) & 0xff);
}

/// Sends all messages to every peer and receives theirs, as an executor does: never blocked on one thing alone.
void run_rank(TcpEndpoint& tcp, int rank, int world_size, const std::vector<size_t>& sizes) {
  std::vector<std::vector<std::byte>> out;
  for (size_t m = 0; m < sizes.size(); ++m) {
    out.emplace_back(sizes[m]);
    for (size_t i = 0; i < sizes[m]; ++i) out[m][i] = expected_byte(rank, m, i);
  }
  std::vector<size_t> pushed(static_cast<size_t>(world_size)), received(pushed);
  std::vector<std::vector<std::byte>> in(pushed.size());
  uint64_t index = 0, total = 0;
  for (bool complete = false; !complete;) {
    complete = true;
    bool moved = false;
    int waiting_for = (rank + 1) % world_size;
    for (int peer = 0; peer < world_size; ++peer) {
      const auto p = static_cast<size_t>(peer);
      if (peer == rank) continue;
      while (pushed[p] < sizes.size()) {
        const size_t m = pushed[p];
        if (!tcp.try_send(peer, signature_of(static_cast<uint32_t>(m), sizes[m]), out[m].data(), sizes[m], index))
          break;
        CHECK_EQ(index, m);
        ++pushed[p];
        moved = true;
      }
      while (received[p] < sizes.size()) {
        const size_t m = received[p];
        in[p].resize(sizes[m]);
        const std::byte* got =
            tcp.try_recv(peer, signature_of(static_cast<uint32_t>(m), sizes[m]), sizes[m], in[p].data());
        if (!got) break;
        for (size_t i = 0; i < sizes[m]; ++i) CHECK(got[i] == expected_byte(peer, m, i));
        tcp.release(peer);
        ++received[p];
        moved = true;
      }
      if (received[p] < sizes.size()) waiting_for = peer;
      complete =
          complete && received[p] == sizes.size() && pushed[p] == sizes.size() && tcp.sent(peer, sizes.size() - 1);
    }
    if (complete || moved) continue;
    tcp.progress();
    tcp.wait(waiting_for, 10ms);
  }
  CHECK(!tcp.progress());
  for (const size_t nbytes : sizes) total += nbytes;
  for (int peer = 0; peer < world_size; ++peer) {
    if (peer != rank) CHECK_EQ(tcp.bytes_sent(peer), total);
  }
}

void run_world(std::vector<std::unique_ptr<TcpEndpoint>> world, const std::vector<size_t>& sizes) {
  std::vector<std::thread> threads;
  const int n = static_cast<int>(world.size());
  for (int rank = 0; rank < n; ++rank) {
    threads.emplace_back([&, rank] { run_rank(*world[static_cast<size_t>(rank)], rank, n, sizes); });
  }
  for (std::thread& thread : threads) thread.join();
}

void test_sizes() {
  const std::vector<size_t> mixed = {0, 1,    31,      32,  33,  4095, 4096, 4097, 64 * 1024, (1 << 20) + 3, 0,
                                     7, 1023, 1 << 20, 128, 129, 1024, 1025, 9000, 1,         200000,        8192};
  std::vector<size_t> many_small(500);
  for (size_t i = 0; i < many_small.size(); ++i) many_small[i] = i * 7 % 90;
  for (const int sockets : {1, 2, 3}) {
    run_world(make_world(2, sockets), mixed);
    run_world(make_world(2, sockets, "127.0.0.1", 4096), mixed);
    run_world(make_world(2, sockets), many_small);
    run_world(make_world(4, sockets), mixed);
  }
  auto v6 = make_world(2, 2, "::1");
  if (v6.empty()) return void(std::printf("SKIPPED ipv6: no ::1 here\n"));
  run_world(std::move(v6), mixed);
}

/// Receives with patience; for messages that are on their way.
void receive(TcpEndpoint& tcp, int peer, const Signature& signature, size_t nbytes) {
  std::vector<std::byte> into(nbytes);
  while (!tcp.try_recv(peer, signature, nbytes, into.data())) tcp.wait(peer, 1s);
}

void test_mismatch() {
  std::vector<std::byte> data(5000);
  uint64_t index = 0;
  const Signature here = signature_of(7, 100);
  Signature there = here;
  there.dtype = DType::int32;
  for (const size_t nbytes : {size_t{0}, size_t{100}, size_t{5000}}) {
    auto world = make_world(2, 2);
    CHECK(world[1]->try_send(0, there, data.data(), nbytes, index));
    CHECK_THROWS(receive(*world[0], 1, here, 100), ErrorKind::mismatch, "rank 1 (host1)");
    world = make_world(2, 2);
    CHECK(world[1]->try_send(0, there, data.data(), nbytes, index));
    CHECK_THROWS(receive(*world[0], 1, here, 5000), ErrorKind::mismatch, "all_reduce");
  }
  auto world = make_world(2, 2);
  CHECK(world[1]->try_send(0, here, data.data(), 100, index));
  CHECK(world[1]->try_send(0, here, data.data(), 99, index));
  receive(*world[0], 1, here, 100);
  CHECK_THROWS(receive(*world[0], 1, here, 100), ErrorKind::mismatch, "99 bytes");
}

void test_lost_peer() {
  std::vector<std::byte> data(1 << 20);
  const Signature signature = signature_of(1, data.size());
  uint64_t index = 0;
  {
    auto world = make_world(3, 2);
    CHECK(world[1]->try_send(0, signature, data.data(), 100, index));
    world[1].reset();
    receive(*world[0], 1, signature, 100);  // What it said before it went still counts.
    CHECK_THROWS(receive(*world[0], 1, signature, 100), ErrorKind::peer_lost, "rank 0: lost rank 1 (host1)");
    const auto push = [&] {
      for (;;) {
        world[0]->try_send(1, signature, data.data(), data.size(), index);
        world[0]->wait(1, 10ms);
        world[0]->progress();
      }
    };
    CHECK_THROWS(push(), ErrorKind::peer_lost, "rank 1 (host1)");
    CHECK(world[0]->try_send(2, signature, data.data(), 100, index));
    receive(*world[2], 0, signature, 100);
  }
  auto world = make_world(2, 2);  // In the middle of a message.
  CHECK(world[1]->try_send(0, signature, data.data(), data.size(), index));
  std::vector<std::byte> into(data.size());
  world[1].reset();
  const auto drain = [&] {
    while (!world[0]->try_recv(1, signature, into.size(), into.data())) world[0]->wait(1, 1s);
    while (!world[0]->try_recv(1, signature, into.size(), into.data())) world[0]->wait(1, 1s);
  };
  CHECK_THROWS(drain(), ErrorKind::peer_lost, "rank 1 (host1)");
}

void test_waiting() {
  auto world = make_world(2, 2);
  std::vector<std::byte> data(4096);
  const Signature signature = signature_of(1, 1);
  uint64_t index = 0;
  // A later message that is there already must not turn waiting for this one into a spin.
  CHECK(world[1]->try_send(0, signature, data.data(), 10, index));
  CHECK(world[1]->try_send(0, signature, data.data(), data.size(), index));
  receive(*world[0], 1, signature, 10);
  const auto start = std::chrono::steady_clock::now();
  world[0]->wait(1, 200ms);
  CHECK(std::chrono::steady_clock::now() - start >= 200ms);  // A busy machine can only make this longer.
  receive(*world[0], 1, signature, data.size());
  // An interrupt ends this wait and every later one.
  std::thread other([&] { world[0]->interrupt(); });
  CHECK(!world[0]->try_recv(1, signature, 10, data.data()));
  for (int i = 0; i < 1000; ++i) world[0]->wait(1, std::chrono::hours(1));
  other.join();
}

void test_full_queue() {
  auto world = make_world(2, 1, "127.0.0.1", 4096);
  std::vector<std::byte> data(8 << 20);
  const Signature signature = signature_of(1, 1);
  uint64_t index = 0, pushed = 0;
  while (world[0]->try_send(1, signature, data.data(), data.size(), index)) ++pushed;
  CHECK_EQ(index + 1, pushed);
  CHECK(pushed > 1);
  CHECK(world[0]->progress());
  CHECK(!world[0]->sent(1, index));
}

/// Refused because the queue is full, which `progress` then empties: there is nothing to wait for.
void test_room_made_between_refusal_and_wait() {
  auto world = make_world(2, 1, "127.0.0.1", 1 << 18);
  std::vector<std::byte> data(1 << 20);
  const Signature signature = signature_of(1, 1);
  uint64_t index = 0, pushed = 0, received = 0;
  while (world[0]->try_send(1, signature, data.data(), data.size(), index)) ++pushed;
  std::vector<std::byte> into(data.size());
  while (received < pushed) {
    if (world[1]->try_recv(0, signature, into.size(), into.data())) ++received;
    world[0]->progress();
  }
  CHECK(!world[0]->try_recv(1, signature, into.size(), into.data()));
  world[0]->wait(1, std::chrono::hours(1));
  CHECK(world[0]->try_send(1, signature, data.data(), 0, index));
}

void test_wrong_use() {
  auto world = make_world(2, 1);
  uint64_t index = 0;
  CHECK(world[0]->sends_in_place(nullptr, 0));
  CHECK_THROWS(world[0]->try_send(0, {}, nullptr, 0, index), ErrorKind::invalid_argument, "no connection with rank 0");
  CHECK_THROWS(world[0]->sent(7, 0), ErrorKind::invalid_argument, "rank 7");
  bool thrown = false;
  try {
    world[0]->try_reserve(1);
  } catch (const std::logic_error&) {
    thrown = true;
  }
  CHECK(thrown);
}

}  // namespace

int main() {
  test_sizes();
  test_mismatch();
  test_lost_peer();
  test_waiting();
  test_full_queue();
  test_room_made_between_refusal_and_wait();
  test_wrong_use();
}
