// Bootstrap: the mesh stands whatever strangers do, and only members of the job are in it.
#include "transport/listener.h"

#include <fcntl.h>
#include <poll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <memory>
#include <thread>
#include <vector>

#include "check.h"
#include "transport/handshake.h"
#include "transport/socket_address.h"

using namespace paracomm;

namespace {

using Sockets = std::vector<PeerSockets>;

struct Job {
  std::vector<std::unique_ptr<Listener>> listeners;
  std::vector<std::string> blobs;

  /// `hosts[r]` is rank r's host.
  Job(const std::vector<std::string>& hosts, ListenerOptions options = {}) {
    for (const std::string& host : hosts) {
      options.host_id = host;
      listeners.push_back(std::make_unique<Listener>(options));
      blobs.push_back(listeners.back()->publish());
    }
  }

  std::vector<Sockets> connect(int sockets_per_peer, double timeout_s = 60) {
    std::vector<Sockets> result(listeners.size());
    std::vector<std::thread> ranks;
    for (size_t rank = 0; rank < listeners.size(); ++rank) {
      ranks.emplace_back([&, rank] {
        result[rank] =
            listeners[rank]->connect(static_cast<int>(rank), blobs, Deadline::after(timeout_s), sockets_per_peer);
      });
    }
    for (std::thread& thread : ranks) thread.join();
    return result;
  }
};

void check_connected(const Fd& a, const Fd& b) {
  CHECK_EQ(::send(a.get(), "x", 1, MSG_NOSIGNAL), 1);
  pollfd polled{b.get(), POLLIN, 0};
  CHECK_EQ(::poll(&polled, 1, 10000), 1);
  char byte = 0;
  CHECK_EQ(::recv(b.get(), &byte, 1, 0), 1);
  CHECK_EQ(byte, 'x');
}

void check_mesh(const std::vector<Sockets>& mesh, const std::vector<std::string>& hosts, int sockets_per_peer) {
  const int world = static_cast<int>(mesh.size());
  const auto find = [&](int rank, int peer) -> const PeerSockets& { return mesh[rank][peer < rank ? peer : peer - 1]; };
  for (int rank = 0; rank < world; ++rank) {
    CHECK_EQ(mesh[rank].size(), static_cast<size_t>(world - 1));
    for (int peer = 0; peer < world; ++peer) {
      if (peer == rank) continue;
      const PeerSockets& here = find(rank, peer);
      const PeerSockets& there = find(peer, rank);
      CHECK_EQ(here.rank, peer);
      CHECK_EQ(here.pid, ::getpid());
      CHECK_EQ(here.same_host, hosts[rank] == hosts[peer]);
      CHECK_EQ(here.data.size(), here.same_host ? size_t{0} : static_cast<size_t>(sockets_per_peer));
      CHECK_EQ(SocketAddress::of_socket(here.control).family() == AF_UNIX, here.same_host);
      CHECK_EQ(::fcntl(here.control.get(), F_GETFL) & O_NONBLOCK, 0);
      check_connected(here.control, there.control);
      for (size_t i = 0; i < here.data.size(); ++i) {
        CHECK(::fcntl(here.data[i].get(), F_GETFL) & O_NONBLOCK);
        check_connected(here.data[i], there.data[i]);
      }
    }
  }
}

void test_mesh() {
  for (const std::vector<std::string>& hosts :
       {std::vector<std::string>{"a"}, {"a", "a"}, {"a", "b"}, {"a", "b", "a", "c", "b"}}) {
    check_mesh(Job(hosts).connect(3), hosts, 3);
  }
}

void test_addresses() {
  const Listener listener;
  CHECK(Address::parse(listener.publish()) == listener.address());
  CHECK_EQ(listener.address().ip, "127.0.0.1");
  CHECK_EQ(Listener().address().host_id, listener.address().host_id);
  const std::string blob = listener.publish();
  for (size_t n = 0; n < blob.size(); ++n) {
    CHECK_THROWS(Address::parse(blob.substr(0, n)), ErrorKind::invalid_argument, "not an address");
  }
  CHECK_THROWS(Address::parse(blob + "x"), ErrorKind::invalid_argument, "bytes follow");
  CHECK_EQ(Listener({.interface = "lo", .master_address = "127.0.0.1"}).address().ip, "127.0.0.1");
  CHECK_EQ(Listener({.interface = "127.0.0.1"}).address().ip, "127.0.0.1");
  CHECK_EQ(Listener({.master_address = "localhost"}).address().hostname, listener.address().hostname);
  CHECK_THROWS(Listener({.interface = "nosuch0"}), ErrorKind::invalid_argument, "'nosuch0' does not exist");
  CHECK_THROWS(Listener({.interface = "203.0.113.77"}), ErrorKind::invalid_argument, "203.0.113.77");
  CHECK_THROWS(Listener({.master_address = "no such host"}), ErrorKind::invalid_argument, "no such host");
}

void test_ipv6() {
  std::unique_ptr<Listener> probe;
  try {
    probe = std::make_unique<Listener>(ListenerOptions{.master_address = "::1"});
  } catch (const Error& error) {
    std::printf("SKIPPED ipv6: %s\n", error.what());
    return;
  }
  CHECK_EQ(probe->address().ip, "::1");
  const std::vector<std::string> hosts{"a", "b", "c"};
  check_mesh(Job(hosts, {.master_address = "::1"}).connect(2), hosts, 2);
  check_mesh(Job(hosts, {.interface = "::1"}).connect(1), hosts, 1);
}

Fd call(const SocketAddress& address) {
  Fd fd = checked_fd(::socket(address.family(), SOCK_STREAM | SOCK_CLOEXEC, 0), "socket");
  if (::connect(fd.get(), address.get(), address.length) != 0) fd.reset();
  return fd;
}

/// Bytes that no member would send first: noise, another protocol, a right start with a wrong proof, one byte of the
/// right start.
std::vector<std::string> garbage() {
  Digest wrong{};
  const Handshake forger = Handshake::connector(wrong, {1, 0, 0, 3});
  const std::string forged(forger.output().begin(), forger.output().end());
  return {"", "GET / HTTP/1.1\r\n\r\n", std::string(5000, '\xff'), forged, forged.substr(0, 1), forged.substr(0, 60)};
}

void test_strangers_stall_nobody() {
  const std::vector<std::string> hosts{"a", "b", "b"};
  // Few strangers at a time, and a patience that is longer than the test: idle ones must make room, not time out.
  Job job(hosts, {.stranger_timeout_s = 300, .max_strangers = 4});
  std::vector<Fd> strangers;
  for (const auto& listener : job.listeners) {
    const Address& address = listener->address();
    for (const auto& target :
         {*SocketAddress::parse_ip(address.ip, address.port), SocketAddress::unix_name(address.unix_name)}) {
      for (const std::string& bytes : garbage()) {
        for (int repeat = 0; repeat < 3; ++repeat) {
          strangers.push_back(call(target));
          CHECK(strangers.back());
          ::send(strangers.back().get(), bytes.data(), bytes.size(), MSG_NOSIGNAL);
        }
      }
    }
  }
  check_mesh(job.connect(2), hosts, 2);
}

void test_silent_stranger_times_out_and_mesh_reports() {
  Job job({"a", "b", "c"}, {.stranger_timeout_s = 0.01});
  const Address& address = job.listeners[0]->address();
  const Fd idle = call(*SocketAddress::parse_ip(address.ip, address.port));
  CHECK_THROWS(job.listeners[0]->connect(0, job.blobs, Deadline::after(0.5), 1), ErrorKind::timeout,
               "1 connections that proved nothing");
  pollfd polled{idle.get(), POLLIN, 0};
  CHECK_EQ(::poll(&polled, 1, 10000), 1);
}

void test_missing_ranks_are_named() {
  Job job({"a", "b", "c"});
  job.listeners[1].reset();
  CHECK_THROWS(job.listeners[2]->connect(2, job.blobs, Deadline::after(0.3), 1), ErrorKind::timeout,
               "rank 1 " + job.listeners[2]->address().hostname);
  CHECK_THROWS(job.listeners[0]->connect(0, job.blobs, Deadline::after(0.3), 1), ErrorKind::timeout, "rank 2");
}

void test_other_secret_is_refused() {
  Job job({"a", "b"});
  Address imposter = Address::parse(job.blobs[0]);
  imposter.secret[7] ^= 1;
  std::thread other([&] {
    CHECK_THROWS(job.listeners[0]->connect(0, job.blobs, Deadline::after(1), 1), ErrorKind::timeout, "rank 1");
  });
  CHECK_THROWS(job.listeners[1]->connect(1, {imposter.serialise(), job.blobs[1]}, Deadline::after(0.5), 1),
               ErrorKind::timeout, "rank 0");
  other.join();
}

void test_different_socket_counts_are_a_mismatch() {
  Job job({"a", "b"});
  std::thread other([&] {
    try {
      job.listeners[1]->connect(1, job.blobs, Deadline::after(1), 3);
    } catch (const Error&) {
    }
  });
  CHECK_THROWS(job.listeners[0]->connect(0, job.blobs, Deadline::after(60), 2), ErrorKind::mismatch,
               "opens 3 data sockets");
  other.join();
}

void test_wrong_use() {
  Job job({"a", "b"});
  CHECK_THROWS(job.listeners[0]->connect(1, job.blobs, Deadline::after(1), 1), ErrorKind::invalid_argument,
               "not what this rank");
  CHECK_THROWS(job.listeners[0]->connect(2, job.blobs, Deadline::after(1), 1), ErrorKind::invalid_argument,
               "blob 2 of 2");
  CHECK_THROWS(job.listeners[0]->connect(0, job.blobs, Deadline::after(1), 0), ErrorKind::invalid_argument,
               "sockets_per_peer");
}

void exchange(Handshake& from, Handshake& to) {
  while (!from.output().empty() && to.wanted() > 0) {
    const size_t n = std::min({from.output().size(), to.wanted(), size_t{7}});
    to.feed(from.output().first(n));
    from.consume_output(n);
  }
}

void test_handshake() {
  Digest secret{};
  random_bytes(secret);
  const Claim claim{3, 1, 2, 5};
  auto connector = Handshake::connector(secret, claim);
  auto acceptor = Handshake::acceptor(secret);
  for (int i = 0; i < 2; ++i) {
    exchange(connector, acceptor);
    exchange(acceptor, connector);
  }
  CHECK(connector.state() == Handshake::State::done);
  CHECK(acceptor.state() == Handshake::State::done);
  CHECK(acceptor.claim() == claim);

  // A recorded conversation, replayed: the hello is believed, the proof of freshness is not.
  std::vector<uint8_t> recorded;
  auto recording = Handshake::connector(secret, claim);
  auto first = Handshake::acceptor(secret);
  recorded.assign(recording.output().begin(), recording.output().end());
  exchange(recording, first);
  exchange(first, recording);
  recorded.insert(recorded.end(), recording.output().begin(), recording.output().end());
  auto second = Handshake::acceptor(secret);
  for (size_t at = 0; at < recorded.size() && second.wanted() > 0;) {
    const size_t n = std::min(recorded.size() - at, second.wanted());
    second.feed(std::span(recorded).subspan(at, n));
    at += n;
  }
  CHECK(second.knows_claim());
  CHECK(second.state() == Handshake::State::failed);

  // A connector's words, sent back to a connector.
  auto here = Handshake::connector(secret, claim);
  auto mirrored = Handshake::connector(secret, {1, 3, 2, 5});
  exchange(mirrored, here);
  CHECK(here.state() == Handshake::State::failed);

  // Any flipped bit of the hello.
  const auto genuine = Handshake::connector(secret, claim);
  for (size_t i = 0; i < genuine.output().size(); ++i) {
    std::vector<uint8_t> changed(genuine.output().begin(), genuine.output().end());
    changed[i] ^= 4;
    auto checker = Handshake::acceptor(secret);
    checker.feed(changed);
    CHECK(checker.state() == Handshake::State::failed);
  }
}

void test_passing_descriptors() {
  const auto mesh = Job({"a", "a"}).connect(1);
  const Fd memory = make_memfd("test", 4096);
  CHECK_EQ(::pwrite(memory.get(), "hello", 5, 100), 5);
  send_fd(mesh[0][0].control, memory.get(), Deadline::after(10));
  const Fd received = recv_fd(mesh[1][0].control, Deadline::after(10));
  char text[6] = {};
  CHECK_EQ(::pread(received.get(), text, 5, 100), 5);
  CHECK_EQ(std::string(text), "hello");
  CHECK(::fcntl(received.get(), F_GETFD) & FD_CLOEXEC);
  CHECK_THROWS(recv_fd(mesh[1][0].control, Deadline::after(0.05)), ErrorKind::timeout, "descriptor");
  CHECK_EQ(::send(mesh[0][0].control.get(), "F", 1, 0), 1);
  CHECK_THROWS(recv_fd(mesh[1][0].control, Deadline::after(10)), ErrorKind::security, "other bytes");
  ::shutdown(mesh[0][0].control.get(), SHUT_RDWR);
  CHECK_THROWS(recv_fd(mesh[1][0].control, Deadline::after(10)), ErrorKind::peer_lost, "closed");
  CHECK_THROWS(send_fd(mesh[1][0].control, memory.get(), Deadline::after(10)), ErrorKind::peer_lost, "passing");
}

/// Received where the table is full: the kernel delivers the byte, and drops the descriptor.
void test_no_room_for_a_descriptor() {
  const auto mesh = Job({"a", "a"}).connect(1);
  const Fd memory = make_memfd("test", 4096);
  send_fd(mesh[0][0].control, memory.get(), Deadline::after(10));
  rlimit usual{}, full{};
  CHECK_EQ(::getrlimit(RLIMIT_NOFILE, &usual), 0);
  const Fd next = make_eventfd();  // every number below is taken
  full = usual;
  full.rlim_cur = static_cast<rlim_t>(next.get());
  CHECK_EQ(::setrlimit(RLIMIT_NOFILE, &full), 0);
  CHECK_THROWS(recv_fd(mesh[1][0].control, Deadline::after(10)), ErrorKind::error,
               "no room for it: this process may have " + std::to_string(next.get()) + " descriptors open (ulimit -n)");
  CHECK_THROWS(make_eventfd(), ErrorKind::error, "descriptors open (ulimit -n)");
  CHECK_EQ(::setrlimit(RLIMIT_NOFILE, &usual), 0);
}

void test_fork_closes_descriptors() {
  auto mesh = Job({"a", "b"}).connect(1);
  Fd kept = make_eventfd();
  const int number = kept.get();
  const pid_t child = ::fork();
  if (child == 0) {
    bool right = !kept && ::fcntl(number, F_GETFD) < 0 && !mesh[0][0].control && !mesh[1][0].data[0];
    // The number may belong to somebody else by now: the parent's object must leave it alone.
    const int other = ::open("/dev/null", O_RDONLY);
    right = right && ::dup2(other, number) == number;
    kept.reset();
    right = right && ::fcntl(number, F_GETFD) >= 0;
    const Fd own = make_eventfd();
    right = right && own;
    ::_exit(right ? 0 : 1);
  }
  int status = -1;
  CHECK_EQ(::waitpid(child, &status, 0), child);
  CHECK_EQ(status, 0);
  CHECK(kept);
  check_connected(mesh[0][0].control, mesh[1][0].control);
}

}  // namespace

int main() {
  test_handshake();
  test_addresses();
  test_mesh();
  test_ipv6();
  test_strangers_stall_nobody();
  test_silent_stranger_times_out_and_mesh_reports();
  test_missing_ranks_are_named();
  test_other_secret_is_refused();
  test_different_socket_counts_are_a_mismatch();
  test_wrong_use();
  test_passing_descriptors();
  test_no_room_for_a_descriptor();
  test_fork_closes_descriptors();
}
