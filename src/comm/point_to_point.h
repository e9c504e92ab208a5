// Messages between two ranks, outside the schedules: each pair, direction and tag in its own order, everything posted
// moves at once, so that an exchange in which both sides send first cannot block.
//
// Between two ranks there is one stream. What comes next in it is taken by the oldest receive of its tag, from this
// peer or from any; if there is none, while others wait for this peer, it is put aside.
#pragma once

#include <condition_variable>
#include <deque>
#include <list>
#include <memory>
#include <mutex>
#include <optional>
#include <thread>
#include <vector>

#include "comm/communicator.h"

namespace paracomm {

class PointToPoint final : public Runner, public std::enable_shared_from_this<PointToPoint> {
 public:
  PointToPoint(Communicator& comm, std::vector<Endpoint*> endpoints, Patience patience);
  ~PointToPoint() override { stop(); }

  std::shared_ptr<Work> post(std::byte* data, size_t nbytes, DType dtype, int peer, int tag, double timeout_s,
                             bool send, Work::Finish finish);
  void finish(Work& work, double timeout_s) override;
  void stop();

 private:
  struct Transfer {
    std::shared_ptr<Work> work;
    std::byte* data = nullptr;
    size_t nbytes = 0, moved = 0;
    Signature signature;
    Deadline deadline = Deadline::never();
    double timeout_s = 0;
    uint64_t last_index = 0;
    uint64_t order = 0;  // of posting, over all peers
    bool by_reference = false, started = false;
    std::vector<std::byte> aside;    // of a message that nobody had asked for: `data` points here, ...
    std::byte* meant_for = nullptr;  // ... and somebody has since, for here
  };
  struct Lane {
    std::deque<Transfer> sends;
    std::list<Transfer> recvs;         // posted, and not yet met by a message
    std::optional<Transfer> incoming;  // the message under way; without a `work` if it is put aside
    std::list<Transfer> aside;         // complete
    uint32_t sent = 0, received = 0;
    bool ended = false;                // the peer's stream has
    std::optional<Deadline> farewell;  // the peer has left; by then, what it sent has come

    bool idle() const noexcept { return sends.empty() && recvs.empty() && !incoming; }
  };

  bool advance_send(int peer, Transfer& transfer);
  /// True: the message is complete.
  bool advance_recv(int peer, Transfer& transfer);
  bool advance_recvs(int peer);
  /// The posted receive that the message takes, or a place to put it aside. Throws Error(mismatch).
  Transfer match(int peer, const Signature& head);
  /// Serves a receive that was posted from what was put aside. False: there is no such message.
  bool take_aside(int peer, Transfer& recv);
  /// Lets a receive have the message that is being put aside. False: there is none, or it has another tag.
  bool take_incoming(int peer, const Transfer& recv);
  /// Throws Error(mismatch) unless the message is what the receive expects.
  void check_fit(int peer, const Transfer& recv, const Signature& head) const;
  /// The same for a message that has come already: the communicator fails.
  void fail_unless_fit(int peer, const Transfer& recv, const Signature& head);
  /// Throws what ends the wait of `transfer`: its deadline, or a peer that has left.
  void look_at_clock(int peer, const Transfer& transfer, bool send);
  /// Of a peer with something posted, which has left.
  [[noreturn]] void throw_left(int peer) const;
  /// One round over everything posted; true if something moved. Fails transfers past their deadline.
  bool round();
  std::string where(const Transfer& transfer, int peer, bool send) const;
  template <class Visit>
  void each_transfer(Visit visit);
  void fail_all(const Error& error);
  /// Completes what is over, with the lock let go meanwhile.
  void settle(std::unique_lock<std::mutex>& lock);
  void drive(std::unique_lock<std::mutex>& lock, const Work* until);
  void nap(std::unique_lock<std::mutex>& lock);
  void serve();
  bool idle() const noexcept;

  Communicator& comm_;
  const int generation_ = fork_generation();
  std::vector<Endpoint*> endpoints_;
  Patience patience_;
  std::mutex mutex_;                 // held while data moves; endpoints have one user at a time
  std::condition_variable changed_;  // for those who wait for a transfer
  std::condition_variable needed_;   // for the thread that serves while nobody waits
  std::vector<Lane> lanes_;
  std::list<Transfer> from_any_;
  std::vector<std::pair<std::shared_ptr<Work>, std::exception_ptr>> over_;  ///< received or failed, to be completed
  uint64_t posted_ = 0;
  uint32_t received_from_any_ = 0;
  bool driving_ = false, stopping_ = false;
  int waiting_ = 0;             // in finish()
  Endpoint* asleep_ = nullptr;  // where the driver naps
  std::vector<int> pending_;    // of a nap: kept for its memory
  std::thread thread_;
};

}  // namespace paracomm
