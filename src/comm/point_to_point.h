// Messages between two ranks, outside the schedules: each pair and direction in its own order, everything posted moves
// at once, so that an exchange in which both sides send first cannot block.
#pragma once

#include <condition_variable>
#include <deque>
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

  std::shared_ptr<Work> post(std::byte* data, size_t nbytes, DType dtype, int peer, double timeout_s, bool send);
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
    bool by_reference = false, started = false;
  };
  struct Lane {
    std::deque<Transfer> sends, recvs;
    uint32_t sent = 0, received = 0;
    std::optional<Deadline> farewell;  // the peer has left; by then, what it sent has come
  };

  bool advance_send(int peer, Transfer& transfer);
  bool advance_recv(int peer, Transfer& transfer);
  /// One round over everything posted; true if something moved. Fails transfers past their deadline.
  bool round();
  std::string where(const Transfer& transfer, int peer, bool send) const;
  void fail_all(const Error& error);
  void drive(std::unique_lock<std::mutex>& lock, const Work* until);
  void serve();
  bool idle() const noexcept;

  Communicator& comm_;
  std::vector<Endpoint*> endpoints_;
  Patience patience_;
  std::mutex mutex_;  // held while data moves; endpoints have one user at a time
  std::condition_variable changed_;
  std::vector<Lane> lanes_;
  bool driving_ = false, stopping_ = false;
  std::thread thread_;
};

}  // namespace paracomm
