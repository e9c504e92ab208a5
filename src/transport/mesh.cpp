#include "transport/mesh.h"

#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/socket.h>

#include <algorithm>
#include <array>
#include <cerrno>

#include "core/error.h"
#include "transport/socket_address.h"

namespace paracomm {
namespace {

constexpr double kRetryAfter_s = 0.05;
constexpr size_t kNamedPeers = 8;  ///< how many missing peers an error lists

bool would_block(int error) { return error == EAGAIN || error == EWOULDBLOCK || error == EINTR; }

}  // namespace

Mesh::Mesh(int rank, std::vector<Address> addresses, const ListenerOptions& options, unsigned scope_id,
           int sockets_per_peer)
    : rank_(rank),
      addresses_(std::move(addresses)),
      options_(options),
      scope_id_(scope_id),
      total_(static_cast<uint32_t>(1 + sockets_per_peer)) {
  for (int peer = 0; peer < static_cast<int>(addresses_.size()); ++peer) {
    if (peer == rank_) continue;
    for (uint32_t index = 0; index < (same_host(peer) ? 1 : total_); ++index) {
      Slot& slot = slots_.emplace_back();
      slot.peer = peer;
      slot.index = index;
    }
  }
}

std::vector<PeerSockets> Mesh::connect(const Fd& unix_socket, const Fd& tcp_socket, Deadline deadline) {
  while (!complete()) {
    if (deadline.expired()) throw_incomplete();
    start_attempts();
    poll_once(unix_socket, tcp_socket, deadline);
    std::erase_if(attempts_, [](const Attempt& attempt) { return !attempt.fd; });
  }
  return hand_over();
}

bool Mesh::same_host(int peer) const { return addresses_[peer].host_id == addresses_[rank_].host_id; }

Mesh::Slot* Mesh::find_slot(int peer, uint32_t index) {
  const auto found = std::find_if(slots_.begin(), slots_.end(),
                                  [&](const Slot& slot) { return slot.peer == peer && slot.index == index; });
  return found == slots_.end() ? nullptr : &*found;
}

bool Mesh::complete() const {
  return std::all_of(slots_.begin(), slots_.end(), [](const Slot& slot) { return static_cast<bool>(slot.fd); });
}

void Mesh::start_attempts() {
  if (!retry_at_.expired()) return;
  bool idle = false;
  for (Slot& slot : slots_) {
    if (slot.peer > rank_ || slot.fd) continue;
    const bool running =
        std::any_of(attempts_.begin(), attempts_.end(), [&](const Attempt& attempt) { return attempt.slot == &slot; });
    if (running) continue;
    start(slot);
    idle = true;
  }
  retry_at_ = Deadline::after(idle ? kRetryAfter_s : 2 * kRetryAfter_s);
}

void Mesh::start(Slot& slot) {
  const Address& to = addresses_[slot.peer];
  const bool over_unix = same_host(slot.peer);
  const SocketAddress target =
      over_unix ? SocketAddress::unix_name(to.unix_name) : *SocketAddress::parse_ip(to.ip, to.port, scope_id_);
  Fd fd = make_stream_socket(target.family());
  if (!over_unix && !options_.interface.empty()) {
    const auto source = SocketAddress::parse_ip(addresses_[rank_].ip, 0, scope_id_);
    if (source->family() == target.family()) {
      set_option(fd, IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, 1);
      if (::bind(fd.get(), source->get(), source->length) != 0) {
        slot.trouble = system_message("binding to " + source->ip(), errno);
        return;
      }
    }
  }
  const bool connected = ::connect(fd.get(), target.get(), target.length) == 0;
  if (!connected && errno != EINPROGRESS && errno != EINTR) {
    slot.trouble = system_message("connect", errno);
    return;
  }
  const Claim claim{static_cast<uint32_t>(rank_), static_cast<uint32_t>(slot.peer), slot.index, total_};
  Attempt attempt{std::move(fd), Handshake::connector(addresses_[0].secret, claim)};
  attempt.slot = &slot;
  attempt.over_unix = over_unix;
  attempt.connected = connected;
  attempts_.push_back(std::move(attempt));
}

void Mesh::accept_from(const Fd& socket, bool over_unix) {
  for (;;) {
    const int accepted = ::accept4(socket.get(), nullptr, nullptr, SOCK_CLOEXEC | SOCK_NONBLOCK);
    if (accepted < 0) {
      if (errno == ECONNABORTED || errno == EPROTO || errno == EINTR) continue;
      if (errno == EMFILE || errno == ENFILE || errno == ENOBUFS || errno == ENOMEM) {
        throw Error(ErrorKind::error, system_message("accepting a connection", errno));
      }
      return;
    }
    Attempt attempt{Fd(accepted), Handshake::acceptor(addresses_[0].secret)};
    if (!over_unix) set_option(attempt.fd, IPPROTO_TCP, TCP_NODELAY, 1);
    attempt.over_unix = over_unix;
    attempt.deadline = Deadline::after(options_.stranger_timeout_s);
    make_room();
    attempts_.push_back(std::move(attempt));
  }
}

void Mesh::make_room() {
  const auto is_stranger = [](const Attempt& attempt) {
    return attempt.fd && attempt.slot == nullptr && !attempt.handshake.knows_claim();
  };
  if (std::count_if(attempts_.begin(), attempts_.end(), is_stranger) < options_.max_strangers) return;
  // Attempts are in order of arrival. The oldest has had the most time to speak: members do so with their first packet.
  drop(*std::find_if(attempts_.begin(), attempts_.end(), is_stranger), "");
}

void Mesh::advance(Attempt& attempt, short events) {
  if (!attempt.connected && events != 0) {
    int error = 0;
    socklen_t size = sizeof error;
    ::getsockopt(attempt.fd.get(), SOL_SOCKET, SO_ERROR, &error, &size);
    if (error != 0) return drop(attempt, system_message("connect", error));
    attempt.connected = true;
  }
  if (events != 0 && !exchange(attempt)) return;
  if (attempt.deadline.expired()) drop(attempt, "");
}

/// Reads and writes what it can. False: the attempt has ended, one way or the other.
bool Mesh::exchange(Attempt& attempt) {
  Handshake& handshake = attempt.handshake;
  for (;;) {
    while (!handshake.output().empty()) {
      const auto output = handshake.output();
      const ssize_t n = ::send(attempt.fd.get(), output.data(), output.size(), MSG_NOSIGNAL | MSG_DONTWAIT);
      if (n < 0 && would_block(errno)) return true;
      if (n < 0) return drop(attempt, system_message("sending the proof", errno)), false;
      handshake.consume_output(static_cast<size_t>(n));
    }
    if (handshake.state() == Handshake::State::done) return finish(attempt), false;
    std::array<uint8_t, 256> input;
    const ssize_t n = ::recv(attempt.fd.get(), input.data(), std::min(handshake.wanted(), input.size()), MSG_DONTWAIT);
    if (n < 0 && would_block(errno)) return true;
    if (n < 0) return drop(attempt, system_message("reading the proof", errno)), false;
    if (n == 0) return drop(attempt, "it closed the connection before it was complete"), false;
    handshake.feed(std::span(input).first(static_cast<size_t>(n)));
    const bool rejected = handshake.knows_claim() && !attempt.slot && !admits(attempt);
    if (handshake.state() == Handshake::State::failed || rejected) {
      if (attempt.slot) attempt.slot->wrong_proof = true;
      return drop(attempt, "what answers there does not belong to this job"), false;
    }
  }
}

/// Whether a member's claim fits the mesh.
bool Mesh::admits(const Attempt& attempt) const {
  const Claim& claim = attempt.handshake.claim();
  const auto from = static_cast<size_t>(claim.from);
  if (from >= addresses_.size() || claim.from <= static_cast<uint32_t>(rank_)) return false;
  if (claim.to != static_cast<uint32_t>(rank_)) return false;
  if (claim.total != total_) {
    throw Error(ErrorKind::mismatch, "rank " + std::to_string(from) + " (" + addresses_[from].hostname + ") opens " +
                                         std::to_string(claim.total - 1) + " data sockets per peer, rank " +
                                         std::to_string(rank_) + " opens " + std::to_string(total_ - 1));
  }
  const bool over_unix = same_host(static_cast<int>(from));
  return attempt.over_unix == over_unix && claim.index < (over_unix ? 1 : total_);
}

void Mesh::finish(Attempt& attempt) {
  Slot* slot = attempt.slot;
  if (!slot) slot = find_slot(static_cast<int>(attempt.handshake.claim().from), attempt.handshake.claim().index);
  // A connector that lost its first connection on the last step opens another: the newer one counts.
  slot->fd = std::move(attempt.fd);
}

void Mesh::drop(Attempt& attempt, const std::string& trouble) {
  if (attempt.slot) {
    attempt.slot->trouble = trouble;
  } else {
    ++refused_;
  }
  attempt.fd.reset();
}

Deadline Mesh::next_event(Deadline deadline) const {
  const bool any_idle =
      std::any_of(slots_.begin(), slots_.end(), [&](const Slot& slot) { return slot.peer < rank_ && !slot.fd; });
  if (any_idle) deadline = std::min(deadline, retry_at_);
  for (const Attempt& attempt : attempts_) deadline = std::min(deadline, attempt.deadline);
  return deadline;
}

void Mesh::poll_once(const Fd& unix_socket, const Fd& tcp_socket, Deadline deadline) {
  std::vector<pollfd> polled{{unix_socket.get(), POLLIN, 0}, {tcp_socket.get(), POLLIN, 0}};
  for (const Attempt& attempt : attempts_) {
    const bool writes = !attempt.connected || !attempt.handshake.output().empty();
    polled.push_back({attempt.fd.get(), static_cast<short>(writes ? POLLOUT : POLLIN), 0});
  }
  if (::poll(polled.data(), polled.size(), next_event(deadline).poll_ms()) < 0) {
    if (errno == EINTR) return;
    throw Error(ErrorKind::error, system_message("poll", errno));
  }
  for (size_t i = 2; i < polled.size(); ++i) advance(attempts_[i - 2], polled[i].revents);
  if (polled[0].revents) accept_from(unix_socket, true);
  if (polled[1].revents) accept_from(tcp_socket, false);
}

void Mesh::throw_incomplete() const {
  std::string missing;
  size_t named = 0, peers = 0;
  int last = -1;
  bool wrong_proof = false;
  for (const Slot& slot : slots_) {
    if (slot.fd || slot.peer == last) continue;
    last = slot.peer;
    ++peers;
    wrong_proof |= slot.wrong_proof;
    if (named == kNamedPeers) continue;
    const Address& address = addresses_[slot.peer];
    missing += named++ ? "; rank " : "rank ";
    missing += std::to_string(slot.peer) + " " + address.describe() + " pid " + std::to_string(address.pid);
    if (same_host(slot.peer)) missing += " on this host";
    if (slot.peer > rank_) {
      missing += ": it did not call";
    } else {
      missing += slot.trouble.empty() ? ": it did not answer" : ": " + slot.trouble;
    }
  }
  if (peers > named) missing += "; and " + std::to_string(peers - named) + " more";
  if (refused_ > 0) missing += "; " + std::to_string(refused_) + " connections that proved nothing were dropped";
  throw Error(wrong_proof ? ErrorKind::security : ErrorKind::timeout,
              "rank " + std::to_string(rank_) + " (" + addresses_[rank_].hostname +
                  ") could not connect in time with " + missing);
}

std::vector<PeerSockets> Mesh::hand_over() {
  std::vector<PeerSockets> peers;
  for (Slot& slot : slots_) {
    if (slot.index == 0) {
      PeerSockets& peer = peers.emplace_back();
      peer.rank = slot.peer;
      peer.same_host = same_host(slot.peer);
      peer.hostname = addresses_[slot.peer].hostname;
      peer.pid = addresses_[slot.peer].pid;
      set_nonblocking(slot.fd, false);
      peer.control = std::move(slot.fd);
    } else {
      peers.back().data.push_back(std::move(slot.fd));
    }
  }
  return peers;
}

}  // namespace paracomm
