// The control plane: what a rank learns when a peer aborts, leaves, dies or babbles.
#include "transport/control.h"

#include <signal.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <condition_variable>
#include <memory>
#include <mutex>
#include <thread>
#include <utility>

#include "check.h"
#include "transport/socket_address.h"

using namespace paracomm;

namespace {

std::pair<Fd, Fd> connected_pair(bool tcp) {
  if (!tcp) {
    int ends[2];
    CHECK_EQ(::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends), 0);
    return {Fd(ends[0]), Fd(ends[1])};
  }
  SocketAddress address = *SocketAddress::parse_ip("127.0.0.1", 0);
  const Fd listener = checked_fd(::socket(AF_INET, SOCK_STREAM, 0), "socket");
  CHECK_EQ(::bind(listener.get(), address.get(), address.length), 0);
  CHECK_EQ(::listen(listener.get(), 1), 0);
  address = SocketAddress::of_socket(listener);
  Fd caller = checked_fd(::socket(AF_INET, SOCK_STREAM, 0), "socket");
  CHECK_EQ(::connect(caller.get(), address.get(), address.length), 0);
  return {checked_fd(::accept(listener.get(), nullptr, nullptr), "accept"), std::move(caller)};
}

std::vector<ControlLink> links_to(int peer, Fd fd) {
  std::vector<ControlLink> links;
  links.push_back({peer, std::move(fd), "host" + std::to_string(peer)});
  return links;
}

/// Keeps events for the test to wait for.
class Events {
 public:
  ControlPlane::Callback callback() {
    return [this](const PeerEvent& event) {
      const std::lock_guard lock(mutex_);
      events_.push_back(event);
      changed_.notify_all();
    };
  }
  PeerEvent next() {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [this] { return seen_ < events_.size(); });
    return events_[seen_++];
  }
  size_t count() {
    const std::lock_guard lock(mutex_);
    return events_.size();
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  std::vector<PeerEvent> events_;
  size_t seen_ = 0;
};

void test_abort_then_goodbye(bool tcp) {
  auto [a, b] = connected_pair(tcp);
  Events at_0, at_1;
  ControlPlane plane_0(0, links_to(1, std::move(a)), at_0.callback());
  auto plane_1 = std::make_unique<ControlPlane>(1, links_to(0, std::move(b)), at_1.callback());
  plane_1->broadcast_abort(ErrorKind::mismatch, "dtypes differ");
  plane_1->broadcast_abort(ErrorKind::timeout, std::string(10000, 'x'));
  PeerEvent event = at_0.next();
  CHECK(event.kind == PeerEvent::Kind::aborted);
  CHECK(event.error_kind == ErrorKind::mismatch);
  CHECK_EQ(event.peer, 1);
  CHECK_EQ(event.text, "dtypes differ");
  event = at_0.next();
  CHECK(event.error_kind == ErrorKind::timeout);
  CHECK_EQ(event.text.size(), size_t{4096});
  plane_1->broadcast_abort(ErrorKind::error, "x" + std::string(4094, 'y') + "\u00e4");  // two bytes, the second beyond
  CHECK_EQ(at_0.next().text, "x" + std::string(4094, 'y'));
  plane_1->goodbye();
  plane_1.reset();
  event = at_0.next();
  CHECK(event.kind == PeerEvent::Kind::left);
  CHECK_EQ(event.text, "rank 1 (host1) left");
  plane_0.broadcast_abort(ErrorKind::error, "nobody hears this");
  CHECK_EQ(at_1.count(), size_t{0});
}

void test_lost(bool tcp) {
  auto [a, b] = connected_pair(tcp);
  Events events;
  const ControlPlane plane(0, links_to(1, std::move(a)), events.callback());
  b.reset();
  const PeerEvent event = events.next();
  CHECK(event.kind == PeerEvent::Kind::lost);
  CHECK(event.error_kind == ErrorKind::peer_lost);
  CHECK(event.text.find("rank 0: lost rank 1 (host1)") == 0);
}

void test_malformed(const std::string& bytes) {
  auto [a, b] = connected_pair(false);
  Events events;
  const ControlPlane plane(0, links_to(1, std::move(a)), events.callback());
  CHECK_EQ(::send(b.get(), bytes.data(), bytes.size(), MSG_NOSIGNAL), static_cast<ssize_t>(bytes.size()));
  const PeerEvent event = events.next();
  CHECK(event.kind == PeerEvent::Kind::lost);
  CHECK(event.text.find("malformed") != std::string::npos);
}

/// A peer that reads nothing (SIGSTOP) must not hold up those who have something to say.
void test_full_buffer_blocks_nobody() {
  auto [a, b] = connected_pair(false);
  auto [c, d] = connected_pair(false);
  set_option(a, SOL_SOCKET, SO_SNDBUF, 1);
  Events at_0, at_2;
  std::vector<ControlLink> links = links_to(1, std::move(a));
  links.push_back({2, std::move(c), "host2"});
  auto plane_0 = std::make_unique<ControlPlane>(0, std::move(links), at_0.callback());
  const ControlPlane plane_2(2, links_to(0, std::move(d)), at_2.callback());
  for (int i = 0; i < 1000; ++i) plane_0->broadcast_abort(ErrorKind::error, std::string(1000, 'x'));
  for (int i = 0; i < 1000; ++i) CHECK(at_2.next().kind == PeerEvent::Kind::aborted);
  // The peer wakes up: nothing was lost or torn.
  Events at_1;
  const ControlPlane plane_1(1, links_to(0, std::move(b)), at_1.callback());
  for (int i = 0; i < 1000; ++i) CHECK_EQ(at_1.next().text.size(), size_t{1000});
  plane_0->goodbye();
  plane_0.reset();
  CHECK(at_1.next().kind == PeerEvent::Kind::left);
}

/// A callback that speaks itself, as an abort that spreads does.
void test_callback_may_broadcast() {
  auto [a, b] = connected_pair(false);
  Events at_1;
  ControlPlane* self = nullptr;
  std::mutex ready;
  std::unique_lock hold(ready);
  ControlPlane plane_0(0, links_to(1, std::move(a)), [&](const PeerEvent& event) {
    const std::lock_guard lock(ready);
    if (event.kind == PeerEvent::Kind::aborted) self->broadcast_abort(event.error_kind, "echo " + event.text);
  });
  self = &plane_0;
  hold.unlock();
  ControlPlane plane_1(1, links_to(0, std::move(b)), at_1.callback());
  plane_1.broadcast_abort(ErrorKind::schedule, "hello");
  const PeerEvent event = at_1.next();
  CHECK_EQ(event.text, "echo hello");
  CHECK(event.error_kind == ErrorKind::schedule);
}

/// A rank is killed while its data loader lives on: the loader must not keep the connection open.
void test_killed_rank_with_living_worker(bool tcp) {
  int lifeline[2];  // The worker lives until the test ends.
  int started[2];
  char byte = 0;
  CHECK_EQ(::pipe(lifeline), 0);
  CHECK_EQ(::pipe(started), 0);
  // A forked rank loses the descriptors that it inherits, so it opens its own.
  const Fd listener = checked_fd(::socket(tcp ? AF_INET : AF_UNIX, SOCK_STREAM, 0), "socket");
  SocketAddress address = tcp ? *SocketAddress::parse_ip("127.0.0.1", 0)
                              : SocketAddress::unix_name("paracomm-test-" + std::to_string(::getpid()));
  CHECK_EQ(::bind(listener.get(), address.get(), address.length), 0);
  CHECK_EQ(::listen(listener.get(), 1), 0);
  if (tcp) address = SocketAddress::of_socket(listener);
  const pid_t rank = ::fork();
  if (rank == 0) {
    Fd fd = checked_fd(::socket(address.family(), SOCK_STREAM, 0), "socket");
    if (::connect(fd.get(), address.get(), address.length) != 0) ::_exit(1);
    auto plane = std::make_unique<ControlPlane>(1, links_to(0, std::move(fd)), [](const PeerEvent&) {});
    if (::fork() == 0) {
      plane->broadcast_abort(ErrorKind::error, "not from the child");
      plane.reset();
      ::close(lifeline[1]);
      if (::write(started[1], "x", 1) != 1) ::_exit(1);
      while (::read(lifeline[0], &byte, 1) > 0) {
      }
      ::_exit(0);
    }
    ::close(lifeline[1]);
    for (;;) ::pause();
  }
  Fd accepted = checked_fd(::accept(listener.get(), nullptr, nullptr), "accept");
  Events events;
  const ControlPlane plane(0, links_to(1, std::move(accepted)), events.callback());
  CHECK_EQ(::read(started[0], &byte, 1), 1);
  CHECK_EQ(::kill(rank, SIGKILL), 0);
  CHECK(events.next().kind == PeerEvent::Kind::lost);
  CHECK_EQ(::waitpid(rank, nullptr, 0), rank);
  for (const int fd : {lifeline[0], lifeline[1], started[0], started[1]}) ::close(fd);
}

}  // namespace

int main() {
  for (const bool tcp : {false, true}) {
    test_abort_then_goodbye(tcp);
    test_lost(tcp);
    test_killed_rank_with_living_worker(tcp);
  }
  test_malformed(std::string(16, 'x'));
  test_malformed(std::string("1Ccp\1\0\0\0\0\0\0\0\xff\xff\xff\xff", 16));
  test_malformed(std::string("1Ccp\1\0\0\0\x7f\0\0\0\0\0\0\0", 16));
  test_full_buffer_blocks_nobody();
  test_callback_may_broadcast();
}
