// Bootstrap: one rank's listening sockets, and the authenticated full mesh of connections made through them.
#pragma once

#include <string>
#include <vector>

#include "core/deadline.h"
#include "core/fd.h"
#include "transport/address.h"

namespace paracomm {

struct ListenerOptions {
  /// A name ("eth0") or an own IP address; empty: the one with the route to `master_address`, else loopback.
  std::string interface = "";
  std::string master_address = "";  ///< host name or IP address of rank 0
  std::string host_id = "";         ///< empty: found out. Ranks with different ones talk TCP, even on one machine
  int backlog = 1024;
  double stranger_timeout_s = 2.0;  ///< a connection that has not proved itself by then is dropped
  int max_strangers = 256;          ///< connections that have not proved themselves; beyond it the oldest makes room
};

/// The connections between this rank and one peer.
struct PeerSockets {
  int rank = -1;
  bool same_host = false;
  Fd control;            ///< a Unix socket on the same host, TCP otherwise; blocking
  std::vector<Fd> data;  ///< TCP, non-blocking; none on the same host
  std::string hostname;
  int pid = 0;
};

/// Listens on an abstract Unix socket and, by TCP, on the address of one interface only.
class Listener {
 public:
  /// Throws Error(invalid_argument) if the interface does not exist or has no address.
  explicit Listener(ListenerOptions options = {});

  const Address& address() const noexcept { return address_; }
  /// What every other rank must be given: `address()`, serialised.
  std::string publish() const { return address_.serialise(); }

  /// Connects all ranks to all. `blobs[r]` is what rank r published. Rank i connects to every j < i and accepts every j
  /// > i, everything at once, so that no order of arrival can block. Call once: it closes the listening sockets. The
  /// result has one entry per peer, in rank order (none for `rank` itself). Throws Error(timeout) naming the ranks that
  /// are missing, Error(security) if one answered with a wrong proof.
  std::vector<PeerSockets> connect(int rank, const std::vector<std::string>& blobs, Deadline deadline,
                                   int sockets_per_peer = 1);

 private:
  ListenerOptions options_;
  Address address_;
  unsigned scope_id_ = 0;  ///< interface of a link-local IPv6 address
  Fd unix_socket_;
  Fd tcp_socket_;
};

/// Passes descriptor `fd` over a Unix socket. Throws Error(peer_lost) or Error(timeout).
void send_fd(const Fd& socket, int fd, Deadline deadline);
/// Takes one descriptor that `send_fd` passed. Throws Error(peer_lost), Error(timeout), or Error(security) for anything
/// else.
Fd recv_fd(const Fd& socket, Deadline deadline);

}  // namespace paracomm
