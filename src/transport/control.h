// The control plane: tells every rank at once when a peer dies, leaves or aborts, whatever the data path is doing.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "core/error.h"
#include "core/fd.h"
#include "core/signature.h"

namespace paracomm {

struct PeerEvent {
  enum class Kind { lost, left, aborted, waiting };

  int peer = -1;
  Kind kind = Kind::lost;
  ErrorKind error_kind = ErrorKind::peer_lost;  ///< aborted: what the peer ran into; lost: peer_lost
  std::string text;                             ///< for people; names peer and host where this side wrote it
  Signature signature{};                        ///< waiting: for peers in this operation
};

struct ControlLink {
  int peer = -1;
  Fd fd;  ///< Unix or TCP stream
  std::string hostname;
};

/// One thread, asleep in epoll until a peer says something or its connection ends.
class ControlPlane {
 public:
  using Callback = std::function<void(const PeerEvent&)>;

  /// `on_event` is called on the control thread, without locks, and must not throw or destroy this object. Per peer:
  /// any number of `aborted` and `waiting`, then one `lost` or `left`.
  ControlPlane(int rank, std::vector<ControlLink> links, Callback on_event);
  /// Hands out what is queued (for 100 ms at most), joins the thread, closes the connections. In a forked child:
  /// nothing.
  ~ControlPlane();
  ControlPlane(const ControlPlane&) = delete;
  ControlPlane& operator=(const ControlPlane&) = delete;

  /// Tells all peers that this rank gave up, and why. From any thread; never blocks; ignores peers that are gone.
  void broadcast_abort(ErrorKind kind, const std::string& text);
  /// Tells all peers in which operation this rank has been waiting for a while: who is in another one finds out.
  void broadcast_waiting(const Signature& signature);
  /// Tells all peers that the end of this connection, when it comes, is no fault.
  void goodbye();

 private:
  class Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace paracomm
