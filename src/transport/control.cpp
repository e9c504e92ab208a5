#include "transport/control.h"

#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cerrno>
#include <cstring>
#include <mutex>
#include <thread>

#include "core/deadline.h"
#include "core/text.h"
#include "transport/socket_address.h"

namespace paracomm {
namespace {

constexpr uint32_t kMagic = 0x70634331;  // "pcC1"
constexpr size_t kMaxText = 4096;
constexpr double kFlush_s = 0.1;

enum class FrameType : uint32_t { abort = 1, goodbye = 2, waiting = 3 };

struct FrameHeader {
  uint32_t magic = kMagic;
  FrameType type = FrameType::goodbye;
  uint32_t error_kind = 0;
  uint32_t nbytes = 0;  ///< of text that follows
};
static_assert(sizeof(FrameHeader) == 16);

std::string pack(FrameType type, ErrorKind kind, const std::string& text) {
  FrameHeader header;
  header.type = type;
  header.error_kind = static_cast<uint32_t>(kind);
  header.nbytes = static_cast<uint32_t>(text.size());
  return std::string(reinterpret_cast<const char*>(&header), sizeof header) + text;
}

bool is_valid(const FrameHeader& header) {
  const bool known = header.type == FrameType::abort || header.type == FrameType::goodbye ||
                     (header.type == FrameType::waiting && header.nbytes == sizeof(Signature));
  return header.magic == kMagic && known && header.error_kind <= static_cast<uint32_t>(ErrorKind::security) &&
         header.nbytes <= kMaxText;
}

/// A host that vanishes sends no end of its connections: probe after 5 s of silence, give up within about 15 s.
void watch_for_vanished_host(const Fd& socket) {
  if (SocketAddress::of_socket(socket).family() == AF_UNIX) return;
  set_option(socket, SOL_SOCKET, SO_KEEPALIVE, 1);
  set_option(socket, IPPROTO_TCP, TCP_KEEPIDLE, 5);
  set_option(socket, IPPROTO_TCP, TCP_KEEPINTVL, 2);
  set_option(socket, IPPROTO_TCP, TCP_KEEPCNT, 5);
  set_option(socket, IPPROTO_TCP, TCP_USER_TIMEOUT, 15000);
}

}  // namespace

class ControlPlane::Impl {
 public:
  Impl(int rank, std::vector<ControlLink> links, Callback on_event)
      : rank_(rank), on_event_(std::move(on_event)), generation_(fork_generation()), stop_(make_eventfd()) {
    epoll_ = checked_fd(::epoll_create1(EPOLL_CLOEXEC), "epoll_create1");
    watch(EPOLL_CTL_ADD, stop_, kStop, EPOLLIN);
    for (ControlLink& link : links) {
      Peer& peer = peers_.emplace_back();
      peer.link = std::move(link);
      set_nonblocking(peer.link.fd, true);
      watch_for_vanished_host(peer.link.fd);
      watch(EPOLL_CTL_ADD, peer.link.fd, static_cast<uint32_t>(peers_.size() - 1), EPOLLIN);
    }
    thread_ = std::make_unique<std::thread>([this] { run(); });
  }

  ~Impl() {
    if (generation_ != fork_generation()) {
      // In a forked child this thread does not exist, so that neither joining nor detaching it makes sense.
      static_cast<void>(thread_.release());
      return;
    }
    flush_before_close();
    ::eventfd_write(stop_.get(), 1);
    thread_->join();
  }

  void send_to_all(const std::string& frame) {
    if (generation_ != fork_generation()) return;
    const std::lock_guard lock(mutex_);
    for (uint32_t i = 0; i < peers_.size(); ++i) {
      if (peers_[i].ended) continue;
      peers_[i].outbox += frame;
      write_outbox(i);
    }
  }

 private:
  struct Peer {
    ControlLink link;
    std::string inbox;   ///< control thread only
    bool left = false;   ///< control thread only: it said goodbye
    std::string outbox;  ///< guarded by mutex_, as are the rest
    bool ended = false;  ///< no more to hear from it or tell it
    bool watched_for_output = false;
  };

  static constexpr uint32_t kStop = UINT32_MAX;

  void watch(int operation, const Fd& fd, uint32_t tag, uint32_t events) {
    epoll_event event{};
    event.events = events;
    event.data.u32 = tag;
    if (::epoll_ctl(epoll_.get(), operation, fd.get(), &event) != 0) {
      throw Error(ErrorKind::error, system_message("epoll_ctl", errno));
    }
  }

  /// Under the lock. What the kernel does not take now, the control thread sends when it does.
  void write_outbox(uint32_t index) {
    Peer& peer = peers_[index];
    while (!peer.outbox.empty()) {
      const ssize_t n = ::send(peer.link.fd.get(), peer.outbox.data(), peer.outbox.size(), MSG_NOSIGNAL | MSG_DONTWAIT);
      if (n < 0 && errno == EINTR) continue;
      if (n < 0 && (errno == EAGAIN || errno == EWOULDBLOCK)) break;
      if (n < 0) {
        peer.outbox.clear();  // The peer is gone; reading will tell.
        break;
      }
      peer.outbox.erase(0, static_cast<size_t>(n));
    }
    if (peer.outbox.empty() == peer.watched_for_output) {
      peer.watched_for_output = !peer.outbox.empty();
      watch(EPOLL_CTL_MOD, peer.link.fd, index, EPOLLIN | (peer.watched_for_output ? uint32_t{EPOLLOUT} : 0u));
    }
  }

  void flush_before_close() {
    const Deadline deadline = Deadline::after(kFlush_s);
    for (;;) {
      std::vector<pollfd> polled;
      {
        const std::lock_guard lock(mutex_);
        for (uint32_t i = 0; i < peers_.size(); ++i) {
          if (peers_[i].ended || peers_[i].outbox.empty()) continue;
          write_outbox(i);
          if (!peers_[i].outbox.empty()) polled.push_back({peers_[i].link.fd.get(), POLLOUT, 0});
        }
      }
      if (polled.empty() || deadline.expired()) return;
      ::poll(polled.data(), polled.size(), deadline.poll_ms());
    }
  }

  void run() {
    for (;;) {
      std::array<epoll_event, 16> events;
      const int count = ::epoll_wait(epoll_.get(), events.data(), static_cast<int>(events.size()), -1);
      for (int i = 0; i < count; ++i) {
        const uint32_t tag = events[static_cast<size_t>(i)].data.u32;
        if (tag == kStop) return;
        if (events[static_cast<size_t>(i)].events & EPOLLOUT) {
          const std::lock_guard lock(mutex_);
          write_outbox(tag);
        }
        if (events[static_cast<size_t>(i)].events & ~uint32_t{EPOLLOUT}) read_from(tag);
      }
    }
  }

  void read_from(uint32_t index) {
    Peer& peer = peers_[index];
    std::array<char, 4096> bytes;
    const ssize_t n = ::recv(peer.link.fd.get(), bytes.data(), bytes.size(), MSG_DONTWAIT);
    if (n < 0 && (errno == EAGAIN || errno == EWOULDBLOCK || errno == EINTR)) return;
    if (n < 0) return end(index, system_message("its control connection broke", errno));
    if (n == 0) return end(index, "it closed its control connection without a goodbye");
    peer.inbox.append(bytes.data(), static_cast<size_t>(n));
    while (peer.inbox.size() >= sizeof(FrameHeader)) {
      FrameHeader header;
      std::memcpy(&header, peer.inbox.data(), sizeof header);
      if (!is_valid(header)) return end(index, "it sent a malformed control message");
      if (peer.inbox.size() < sizeof header + header.nbytes) return;
      const std::string text = peer.inbox.substr(sizeof header, header.nbytes);
      peer.inbox.erase(0, sizeof header + header.nbytes);
      if (header.type == FrameType::goodbye) {
        peer.left = true;
      } else if (header.type == FrameType::waiting) {
        PeerEvent event{peer.link.peer, PeerEvent::Kind::waiting, ErrorKind::mismatch, "", {}};
        std::memcpy(&event.signature, text.data(), sizeof event.signature);
        on_event_(event);
      } else {
        on_event_({peer.link.peer, PeerEvent::Kind::aborted, static_cast<ErrorKind>(header.error_kind), text, {}});
      }
    }
  }

  void end(uint32_t index, const std::string& why) {
    Peer& peer = peers_[index];
    {
      const std::lock_guard lock(mutex_);
      peer.ended = true;
      peer.outbox.clear();
      ::epoll_ctl(epoll_.get(), EPOLL_CTL_DEL, peer.link.fd.get(), nullptr);
    }
    const std::string who = "rank " + std::to_string(peer.link.peer) + " (" + peer.link.hostname + ")";
    if (peer.left) {
      on_event_({peer.link.peer, PeerEvent::Kind::left, ErrorKind::peer_lost, who + " left", {}});
    } else {
      on_event_({peer.link.peer,
                 PeerEvent::Kind::lost,
                 ErrorKind::peer_lost,
                 "rank " + std::to_string(rank_) + ": lost " + who + ": " + why,
                 {}});
    }
  }

  int rank_;
  Callback on_event_;
  int generation_;
  Fd stop_;
  Fd epoll_;
  std::vector<Peer> peers_;  ///< as many from construction on
  std::mutex mutex_;
  std::unique_ptr<std::thread> thread_;
};

ControlPlane::ControlPlane(int rank, std::vector<ControlLink> links, Callback on_event)
    : impl_(std::make_unique<Impl>(rank, std::move(links), std::move(on_event))) {}

ControlPlane::~ControlPlane() = default;

void ControlPlane::broadcast_abort(ErrorKind kind, const std::string& text) {
  impl_->send_to_all(pack(FrameType::abort, kind, cut_text(text, kMaxText)));
}

void ControlPlane::broadcast_waiting(const Signature& signature) {
  const std::string bytes(reinterpret_cast<const char*>(&signature), sizeof signature);
  impl_->send_to_all(pack(FrameType::waiting, ErrorKind::mismatch, bytes));
}

void ControlPlane::goodbye() { impl_->send_to_all(pack(FrameType::goodbye, ErrorKind::error, "")); }

}  // namespace paracomm
