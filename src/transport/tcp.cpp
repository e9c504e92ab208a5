#include "transport/tcp.h"

#include <linux/tcp.h>
#include <netinet/in.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <sys/uio.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstring>
#include <span>
#include <stdexcept>
#include <utility>

#include "core/error.h"

namespace paracomm {
namespace {

struct Header {
  Signature signature;
  uint64_t nbytes = 0;
};
static_assert(sizeof(Header) == 32);

constexpr size_t kQueue = 64;            ///< messages to one peer that wait for the kernel
constexpr size_t kMaxParts = 32;         ///< pieces of memory that one system call writes
constexpr size_t kReadAhead = 8 * 1024;  ///< after a short message, the next ones come along
constexpr size_t kShortMessage = 4 * 1024;
constexpr size_t kDiscarded = 1 << 20;  ///< bytes that one system call reads when nobody wants them
constexpr int kDiscards = 64;           ///< calls at most, of a socket whose peer goes on sending

bool would_block(int error) { return error == EAGAIN || error == EWOULDBLOCK || error == EINTR; }

/// On a path of less than a millisecond Reno replaces whatever the system prefers. Between two network namespaces, 64
/// MiB each way at once, best and middle of four interleaved runs beside other load: BBR 74 and 76 ms, Cubic 40 and 61,
/// Reno 40 and 50. The gap to BBR showed in every run; that to Cubic is within the noise of some.
void tune(const Fd& socket) {
  constexpr uint32_t kLocal_us = 1000;
  tcp_info info{};
  socklen_t size = sizeof info;
  if (::getsockopt(socket.get(), IPPROTO_TCP, TCP_INFO, &info, &size) != 0) return;
  if (info.tcpi_min_rtt < kLocal_us) ::setsockopt(socket.get(), IPPROTO_TCP, TCP_CONGESTION, "reno", 4);
}

/// The part of a payload that travels over one socket.
struct Share {
  size_t begin = 0;
  size_t nbytes = 0;
};

}  // namespace

/// The sockets, the send queue and the message under way of one peer.
class TcpEndpoint::Link {
 public:
  Link(int rank, TcpPeer peer, const TcpOptions& options)
      : rank_(rank), peer_(std::move(peer)), options_(options), lanes_(peer_.sockets.size()) {
    for (const Fd& socket : peer_.sockets) {
      set_nonblocking(socket, true);
      tune(socket);
    }
  }

  bool push(const Signature& signature, const std::byte* data, size_t nbytes, uint64_t& index) {
    if (pushed_ - finished() == kQueue) return refuse();
    index = pushed_++;
    queue_[index % kQueue] = {{signature, nbytes}, data};
    payload_ += nbytes;
    flush();
    return true;
  }

  bool sent(uint64_t index) {
    if (finished() <= index) flush();
    return finished() > index || refuse();
  }

  /// Writes what the kernel takes. False: nothing is left to write.
  bool flush() {
    bool left = false;
    for (size_t lane = 0; lane < lanes_.size(); ++lane) left |= lanes_[lane].next < pushed_ && !flush_lane(lane);
    return left;
  }

  bool peek(Signature& signature) {
    receiving_ = true;
    take_ahead(reinterpret_cast<std::byte*>(&header_), sizeof(Header), header_read_);
    if (header_read_ < sizeof(Header)) {
      const std::array<iovec, 2> parts{
          {{reinterpret_cast<std::byte*>(&header_) + header_read_, sizeof(Header) - header_read_},
           {ahead_.data(), kReadAhead}}};
      const size_t n = read_some(0, parts);
      const size_t to_header = std::min(n, parts[0].iov_len);
      header_read_ += to_header;
      ahead_begin_ = 0;
      ahead_end_ = n - to_header;
    }
    for (Lane& lane : lanes_) lane.starved = false;
    lanes_[0].starved = header_read_ < sizeof(Header);
    if (lanes_[0].starved) return false;
    signature = header_.signature;
    return true;
  }

  const std::byte* receive(const Signature& signature, size_t nbytes, std::byte* into) {
    receiving_ = true;
    bool complete = true;
    for (size_t lane = 0; lane < lanes_.size(); ++lane) {
      lanes_[lane].starved = !(lane == 0 ? receive_first(signature, nbytes, into) : receive_share(lane, nbytes, into));
      complete &= !lanes_[lane].starved;
    }
    if (!complete) return nullptr;
    receiving_ = false;
    header_read_ = 0;
    for (Lane& lane : lanes_) lane.received = 0;
    static constexpr std::byte nothing{};
    return into ? into : &nothing;
  }

  void add_output(std::vector<pollfd>& polled) const {
    for (size_t lane = 0; lane < lanes_.size(); ++lane) {
      if (lanes_[lane].next < pushed_) polled.push_back({peer_.sockets[lane].get(), POLLOUT, 0});
    }
  }

  /// Only where the message under way has bytes to come: a later message must not keep us awake.
  void add_input(std::vector<pollfd>& polled) const {
    if (!receiving_) return;
    for (size_t lane = 0; lane < lanes_.size(); ++lane) {
      if (lanes_[lane].starved) polled.push_back({peer_.sockets[lane].get(), POLLIN, 0});
    }
  }

  /// Since somebody was refused (queue full, message not sent), a message has been written: do not sleep on that.
  bool take_news() { return std::exchange(news_, false); }

  uint64_t payload() const { return payload_; }

  /// What was sent still arrives: a socket that is closed with bytes unread would take it back, so they are read first.
  void close() noexcept {
    for (Fd& socket : peer_.sockets) {
      for (int i = 0; i < kDiscards; ++i)
        if (::recv(socket.get(), nullptr, kDiscarded, MSG_TRUNC | MSG_DONTWAIT) <= 0) break;
      socket.reset();
    }
  }

 private:
  struct Message {
    Header header;
    const std::byte* data = nullptr;
  };
  struct Lane {
    uint64_t next = 0;     ///< first message that this socket has not written
    size_t written = 0;    ///< bytes of it that are written, header included
    size_t received = 0;   ///< payload bytes of the message under way
    bool starved = false;  ///< its part of that message has bytes to come
  };

  Share share_of(size_t lane, size_t nbytes) const {
    if (nbytes < options_.stripe_from || lanes_.size() == 1) return {0, lane == 0 ? nbytes : 0};
    // Whole cache lines, so that no line is written by two copies.
    const size_t part = (nbytes / lanes_.size() + 63) / 64 * 64;
    const size_t begin = std::min(nbytes, lane * part);
    return {begin, (lane + 1 == lanes_.size() ? nbytes : std::min(nbytes, begin + part)) - begin};
  }

  bool refuse() {
    refused_ = true;
    return false;
  }

  /// Messages that every socket has written.
  uint64_t finished() const {
    uint64_t least = pushed_;
    for (const Lane& lane : lanes_) least = std::min(least, lane.next);
    return least;
  }

  /// The unwritten pieces of the lane's messages, as many as fit.
  size_t gather(size_t lane, std::array<iovec, kMaxParts>& parts) {
    size_t count = 0;
    size_t skip = lanes_[lane].written;
    const auto add = [&](const void* data, size_t nbytes) {
      const size_t skipped = std::min(skip, nbytes);
      skip -= skipped;
      if (nbytes > skipped) {
        parts[count++] = {const_cast<char*>(static_cast<const char*>(data)) + skipped, nbytes - skipped};
      }
    };
    for (uint64_t index = lanes_[lane].next; index < pushed_ && count + 2 <= kMaxParts; ++index) {
      const Message& message = queue_[index % kQueue];
      const Share share = share_of(lane, message.header.nbytes);
      if (lane == 0) add(&message.header, sizeof(Header));
      if (share.nbytes > 0) add(message.data + share.begin, share.nbytes);
    }
    return count;
  }

  /// Moves the lane past `nbytes` written bytes, and past messages that have none for it.
  void advance(size_t lane, size_t nbytes) {
    Lane& at = lanes_[lane];
    at.written += nbytes;
    while (at.next < pushed_) {
      const size_t whole =
          share_of(lane, queue_[at.next % kQueue].header.nbytes).nbytes + (lane == 0 ? sizeof(Header) : 0);
      if (at.written < whole) return;
      at.written -= whole;
      ++at.next;
      news_ |= std::exchange(refused_, false);
    }
  }

  /// False: the kernel takes no more for now.
  bool flush_lane(size_t lane) {
    advance(lane, 0);
    while (lanes_[lane].next < pushed_) {
      std::array<iovec, kMaxParts> parts;
      msghdr message{};
      message.msg_iov = parts.data();
      message.msg_iovlen = gather(lane, parts);
      const ssize_t n = ::sendmsg(peer_.sockets[lane].get(), &message, MSG_NOSIGNAL | MSG_DONTWAIT);
      if (n < 0 && would_block(errno)) return false;
      if (n < 0) throw_lost(errno);
      advance(lane, static_cast<size_t>(n));
    }
    return true;
  }

  /// Socket 0: the header and its share. True when both are complete.
  bool receive_first(const Signature& signature, size_t nbytes, std::byte* into) {
    size_t& received = lanes_[0].received;
    const size_t share = share_of(0, nbytes).nbytes;
    take_ahead(reinterpret_cast<std::byte*>(&header_), sizeof(Header), header_read_);
    if (header_read_ == sizeof(Header)) check_header(signature, nbytes);
    take_ahead(into, share, received);
    while (header_read_ < sizeof(Header) || received < share) {
      // Behind a long message only the next header is read ahead: its payload shall go straight to where it belongs.
      const std::array<iovec, 3> parts{
          {{reinterpret_cast<std::byte*>(&header_) + header_read_, sizeof(Header) - header_read_},
           {into ? into + received : nullptr, share - received},
           {ahead_.data(), nbytes <= kShortMessage ? kReadAhead : sizeof(Header)}}};
      size_t n = read_some(0, parts);
      const bool drained = n < parts[0].iov_len + parts[1].iov_len + parts[2].iov_len;
      const size_t to_header = std::min(n, parts[0].iov_len);
      const size_t to_share = std::min(n - to_header, parts[1].iov_len);
      header_read_ += to_header;
      received += to_share;
      ahead_begin_ = 0;
      ahead_end_ = n - to_header - to_share;
      if (header_read_ == sizeof(Header)) check_header(signature, nbytes);
      if (drained) break;
    }
    return header_read_ == sizeof(Header) && received == share;
  }

  bool receive_share(size_t lane, size_t nbytes, std::byte* into) {
    const Share share = share_of(lane, nbytes);
    while (lanes_[lane].received < share.nbytes) {
      const iovec part{into + share.begin + lanes_[lane].received, share.nbytes - lanes_[lane].received};
      const size_t n = read_some(lane, std::span(&part, 1));
      lanes_[lane].received += n;
      if (n < part.iov_len) return false;
    }
    return true;
  }

  /// Moves bytes that were read ahead to `to`, of which `have` of `want` bytes are there.
  void take_ahead(std::byte* to, size_t want, size_t& have) {
    const size_t n = std::min(want - have, ahead_end_ - ahead_begin_);
    if (n == 0) return;
    std::memcpy(to + have, ahead_.data() + ahead_begin_, n);
    ahead_begin_ += n;
    have += n;
  }

  /// Less than there is room for: no more has arrived. 0: nothing.
  size_t read_some(size_t lane, std::span<const iovec> parts) {
    msghdr message{};
    message.msg_iov = const_cast<iovec*>(parts.data());
    message.msg_iovlen = parts.size();
    const ssize_t n = ::recvmsg(peer_.sockets[lane].get(), &message, MSG_DONTWAIT);
    if (n == 0) throw_lost(0);
    if (n < 0 && !would_block(errno)) throw_lost(errno);
    return static_cast<size_t>(std::max<ssize_t>(n, 0));
  }

  void check_header(const Signature& signature, size_t nbytes) const {
    if (header_.signature == signature && header_.nbytes == nbytes) return;
    std::string what = "rank " + std::to_string(rank_) + ": ";
    if (header_.signature == signature) {
      what += "rank " + name() + " sent a message of " + std::to_string(header_.nbytes) + " bytes in " +
              describe(signature) + ", expected " + std::to_string(nbytes);
    } else {
      what += describe(signature) + " here, but rank " + name() + " runs " + describe(header_.signature) + ": " +
              difference(signature, header_.signature);
    }
    throw Error(ErrorKind::mismatch, what);
  }

  [[noreturn]] void throw_lost(int error) const {
    const std::string what = "rank " + std::to_string(rank_) + ": lost rank " + name();
    throw Error(ErrorKind::peer_lost, error ? system_message(what, error) : what + ": it closed the connection");
  }

  std::string name() const { return std::to_string(peer_.rank) + " (" + peer_.hostname + ")"; }

  int rank_;
  TcpPeer peer_;
  const TcpOptions& options_;
  std::vector<Lane> lanes_;
  std::array<Message, kQueue> queue_;
  uint64_t pushed_ = 0;
  uint64_t payload_ = 0;
  bool refused_ = false;
  bool news_ = false;
  bool receiving_ = false;
  Header header_;
  size_t header_read_ = 0;
  std::array<std::byte, kReadAhead> ahead_;
  size_t ahead_begin_ = 0;
  size_t ahead_end_ = 0;
};

TcpEndpoint::TcpEndpoint(int rank, int world_size, std::vector<TcpPeer> peers, TcpOptions options)
    : rank_(rank),
      options_(options),
      links_(static_cast<size_t>(world_size)),
      interrupt_(make_eventfd()),
      nudge_(make_eventfd()) {
  for (TcpPeer& peer : peers) {
    if (peer.rank < 0 || peer.rank >= world_size || peer.rank == rank || peer.sockets.empty()) {
      throw Error(ErrorKind::invalid_argument, "tcp: rank " + std::to_string(peer.rank) + " of " +
                                                   std::to_string(world_size) + " is no peer with sockets");
    }
    links_[static_cast<size_t>(peer.rank)] = std::make_unique<Link>(rank, std::move(peer), options_);
  }
}

TcpEndpoint::~TcpEndpoint() = default;

bool TcpEndpoint::sends_in_place(const std::byte*, size_t) const noexcept { return true; }

std::byte* TcpEndpoint::try_reserve(size_t) { throw std::logic_error("tcp sends in place; nothing to reserve"); }

bool TcpEndpoint::try_send(int peer, const Signature& signature, const std::byte* data, size_t nbytes,
                           uint64_t& index) {
  return link(peer).push(signature, data, nbytes, index);
}

bool TcpEndpoint::sent(int peer, uint64_t index) { return link(peer).sent(index); }

bool TcpEndpoint::peek(int peer, Signature& signature) { return link(peer).peek(signature); }

const std::byte* TcpEndpoint::try_recv(int peer, const Signature& signature, size_t nbytes, std::byte* into) {
  return link(peer).receive(signature, nbytes, into);
}

void TcpEndpoint::release(int) {}

bool TcpEndpoint::progress() {
  bool left = false;
  for (const auto& each : links_) left |= each && each->flush();
  return left;
}

void TcpEndpoint::wait_any(std::span<const int> peers, std::chrono::microseconds at_most) {
  polled_.assign({{interrupt_.get(), POLLIN, 0}, {nudge_.get(), POLLIN, 0}});
  bool news = false;
  for (const auto& each : links_) {
    if (!each) continue;
    news |= each->take_news();
    each->add_output(polled_);
  }
  if (news) return;
  for (const int peer : peers) link(peer).add_input(polled_);
  const auto seconds = std::chrono::duration_cast<std::chrono::seconds>(at_most);
  const timespec limit{static_cast<time_t>(seconds.count()),
                       static_cast<long>(std::chrono::nanoseconds(at_most - seconds).count())};
  if (::ppoll(polled_.data(), polled_.size(), &limit, nullptr) < 0 && errno != EINTR) {
    throw Error(ErrorKind::error, system_message("poll", errno));
  }
  eventfd_t nudges = 0;
  if (polled_[1].revents != 0) ::eventfd_read(nudge_.get(), &nudges);
}

void TcpEndpoint::interrupt() noexcept {
  const std::lock_guard lock(wakers_);
  ::eventfd_write(interrupt_.get(), 1);
}

void TcpEndpoint::nudge() noexcept {
  const std::lock_guard lock(wakers_);
  ::eventfd_write(nudge_.get(), 1);
}

void TcpEndpoint::close() noexcept {
  for (const auto& each : links_)
    if (each) each->close();
  const std::lock_guard lock(wakers_);
  interrupt_.reset();
  nudge_.reset();
}

uint64_t TcpEndpoint::bytes_sent(int peer) const { return link(peer).payload(); }

TcpEndpoint::Link& TcpEndpoint::link(int peer) const {
  if (peer < 0 || static_cast<size_t>(peer) >= links_.size() || !links_[static_cast<size_t>(peer)]) {
    throw Error(ErrorKind::invalid_argument,
                "tcp: rank " + std::to_string(rank_) + " has no connection with rank " + std::to_string(peer));
  }
  return *links_[static_cast<size_t>(peer)];
}

}  // namespace paracomm
