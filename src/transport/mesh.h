// The full mesh: connects to the ranks below, accepts those above, in one poll loop.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "core/deadline.h"
#include "core/fd.h"
#include "transport/address.h"
#include "transport/handshake.h"
#include "transport/listener.h"

namespace paracomm {

class Mesh {
 public:
  /// `scope_id`: the interface of link-local IPv6 addresses.
  Mesh(int rank, std::vector<Address> addresses, const ListenerOptions& options, unsigned scope_id,
       int sockets_per_peer);

  /// Both sockets listen and do not block.
  std::vector<PeerSockets> connect(const Fd& unix_socket, const Fd& tcp_socket, Deadline deadline);

 private:
  /// One connection of the mesh, whoever opens it.
  struct Slot {
    int peer = -1;
    uint32_t index = 0;
    Fd fd;                ///< done
    std::string trouble;  ///< why the last attempt failed
    bool wrong_proof = false;
  };
  /// A connection under way.
  struct Attempt {
    Fd fd;
    Handshake handshake;
    Slot* slot = nullptr;  ///< ours to open; nullptr: a stranger
    bool over_unix = false;
    bool connected = true;
    Deadline deadline = Deadline::never();
  };

  bool same_host(int peer) const;
  Slot* find_slot(int peer, uint32_t index);
  bool complete() const;

  void start_attempts();
  void start(Slot& slot);
  void accept_from(const Fd& socket, bool over_unix);
  void make_room();
  void advance(Attempt& attempt, short events);
  bool exchange(Attempt& attempt);
  void finish(Attempt& attempt);
  bool admits(const Attempt& attempt) const;
  void drop(Attempt& attempt, const std::string& trouble);
  Deadline next_event(Deadline deadline) const;
  void poll_once(const Fd& unix_socket, const Fd& tcp_socket, Deadline deadline);
  [[noreturn]] void throw_incomplete() const;
  std::vector<PeerSockets> hand_over();

  int rank_;
  std::vector<Address> addresses_;
  const ListenerOptions& options_;
  unsigned scope_id_;
  uint32_t total_;
  std::vector<Slot> slots_;
  std::vector<Attempt> attempts_;
  Deadline retry_at_ = Deadline::after(0);  ///< idle slots of ours start again then
  int refused_ = 0;                         ///< strangers that were dropped
};

}  // namespace paracomm
