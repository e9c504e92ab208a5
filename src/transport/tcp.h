// TCP between hosts: messages by reference, striped over several sockets when they are long.
//
// On the wire a message is a header (signature, nbytes) and its payload. Both follow each other on socket 0; a payload
// of `stripe_from` bytes or more is cut into one contiguous part per socket.
#pragma once

#include <poll.h>

#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "core/fd.h"
#include "transport/transport.h"

namespace paracomm {

struct TcpPeer {
  int rank = -1;
  std::string hostname;
  std::vector<Fd> sockets;  ///< connected, at least one; the same number and order at both ends
};

struct TcpOptions {
  size_t stripe_from = 64 * 1024;  ///< both ends must agree
};

class TcpEndpoint final : public Endpoint {
 public:
  TcpEndpoint(int rank, int world_size, std::vector<TcpPeer> peers, TcpOptions options = {});
  ~TcpEndpoint() override;

  const char* name() const noexcept override { return "tcp"; }
  bool sends_in_place(const std::byte* data, size_t nbytes) const noexcept override;
  bool stages() const noexcept override { return false; }
  std::byte* try_reserve(size_t nbytes) override;
  bool try_send(int peer, const Signature& signature, const std::byte* data, size_t nbytes, uint64_t& index) override;
  bool sent(int peer, uint64_t index) override;
  bool peek(int peer, Signature& signature) override;
  const std::byte* try_recv(int peer, const Signature& signature, size_t nbytes, std::byte* into) override;
  void release(int peer) override;
  bool progress() override;
  void wait_any(std::span<const int> peers, std::chrono::microseconds at_most) override;
  void interrupt() noexcept override;
  void nudge() noexcept override;
  void close() noexcept override;
  uint64_t bytes_sent(int peer) const override;

 private:
  class Link;
  Link& link(int peer) const;

  int rank_;
  TcpOptions options_;
  std::vector<std::unique_ptr<Link>> links_;  ///< by rank; empty where this transport does not reach
  std::mutex wakers_;                         ///< close() takes from other threads what they wake with
  Fd interrupt_, nudge_;
  std::vector<pollfd> polled_;  ///< of the last wait: kept for its memory
};

}  // namespace paracomm
