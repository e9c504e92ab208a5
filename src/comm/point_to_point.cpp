#include "comm/point_to_point.h"

#include <sched.h>

#include <algorithm>

#include "core/nap.h"

namespace paracomm {
namespace {

constexpr size_t kSlice = 128 * 1024;  // a ring of MemoryOptions::ring_per_peer holds several
constexpr double kFarewell_s = 0.5;    // over TCP, the last messages of a rank may come after the news that it left

}  // namespace

PointToPoint::PointToPoint(Communicator& comm, std::vector<Endpoint*> endpoints, Patience patience)
    : comm_(comm), endpoints_(std::move(endpoints)), patience_(patience), lanes_(endpoints_.size()) {}

std::shared_ptr<Work> PointToPoint::post(std::byte* data, size_t nbytes, DType dtype, int peer, double timeout_s,
                                         bool send) {
  if (peer < 0 || peer >= comm_.world_size() || peer == comm_.rank())
    throw Error(ErrorKind::invalid_argument, std::string(send ? "send to" : "recv from") + " rank " +
                                                 std::to_string(peer) + " on rank " + std::to_string(comm_.rank()) +
                                                 " of " + std::to_string(comm_.world_size()));
  auto work = std::make_shared<Work>(shared_from_this());
  Transfer transfer;
  transfer.work = work;
  transfer.data = data;
  transfer.nbytes = nbytes;
  transfer.timeout_s = timeout_s >= 0 ? timeout_s : comm_.options().timeout_s;
  transfer.deadline = Deadline::after(transfer.timeout_s);
  transfer.signature.collective = Collective::send;
  transfer.signature.count = nbytes / size_of(dtype);
  transfer.signature.dtype = dtype;
  const std::lock_guard lock(mutex_);
  Lane& lane = lanes_[static_cast<size_t>(peer)];
  transfer.signature.sequence = (send ? lane.sent : lane.received) + 1;
  if (stopping_ || comm_.interruption_.stop.load(std::memory_order_acquire))
    comm_.throw_failure(where(transfer, peer, send));
  ++(send ? lane.sent : lane.received);
  (send ? lane.sends : lane.recvs).push_back(std::move(transfer));
  if (!thread_.joinable()) thread_ = std::thread([this] { serve(); });
  changed_.notify_all();
  return work;
}

bool PointToPoint::advance_send(int peer, Transfer& t) {
  Endpoint& endpoint = *endpoints_[static_cast<size_t>(peer)];
  bool moved = false;
  while (t.moved < t.nbytes || !t.started) {
    const size_t n = std::min(kSlice, t.nbytes - t.moved);
    const std::byte* payload = t.data + t.moved;
    if (endpoint.sends_in_place(payload, n)) {
      if (!endpoint.try_send(peer, t.signature, payload, n, t.last_index)) return moved;
      t.by_reference = true;
    } else {
      std::byte* staged = endpoint.try_reserve_for(peer, n);
      if (staged == nullptr) return moved;
      void* dst = staged;
      copy_bytes(&dst, 1, payload, n);
      // The queue is full: what was reserved goes back, and meanwhile others, above all receives, must get on.
      if (!endpoint.try_send(peer, t.signature, staged, n, t.last_index)) return moved;
    }
    t.moved += n;
    t.started = moved = true;
  }
  if (t.by_reference && !endpoint.sent(peer, t.last_index)) return moved;
  t.work->complete();
  return true;
}

bool PointToPoint::advance_recv(int peer, Transfer& t) {
  Endpoint& endpoint = *endpoints_[static_cast<size_t>(peer)];
  bool moved = false;
  while (t.moved < t.nbytes || !t.started) {
    const size_t n = std::min(kSlice, t.nbytes - t.moved);
    const std::byte* bytes = endpoint.try_recv(peer, t.signature, n, t.data + t.moved);
    if (bytes == nullptr) return moved;
    void* dst = t.data + t.moved;
    if (n > 0) copy_bytes(&dst, 1, bytes, n);
    endpoint.release(peer);
    t.moved += n;
    t.started = moved = true;
  }
  t.work->complete();
  return true;
}

bool PointToPoint::round() {
  bool moved = false;
  for (int peer = 0; peer < static_cast<int>(lanes_.size()); ++peer) {
    Lane& lane = lanes_[static_cast<size_t>(peer)];
    const bool left = comm_.interruption_.left[static_cast<size_t>(peer)].load(std::memory_order_acquire);
    while (!lane.sends.empty()) {
      Transfer& t = lane.sends.front();
      if (!t.work->done()) moved |= advance_send(peer, t);
      if (!t.work->done()) break;
      lane.sends.pop_front();
    }
    while (!lane.recvs.empty()) {
      Transfer& t = lane.recvs.front();
      if (!t.work->done()) moved |= advance_recv(peer, t);
      if (!t.work->done()) break;
      lane.recvs.pop_front();
    }
    for (auto* list : {&lane.sends, &lane.recvs}) {
      if (list->empty()) continue;
      const Transfer& t = list->front();
      const std::string what = where(t, peer, list == &lane.sends);
      if (left && (moved || !lane.farewell)) lane.farewell = Deadline::after(kFarewell_s);
      if (left && lane.farewell->expired())
        throw Error(ErrorKind::peer_lost, what + ", which has closed its communicator");
      if (t.deadline.expired())
        throw Error(ErrorKind::timeout, what + " timed out after " + std::to_string(t.timeout_s) + " s");
    }
  }
  return moved;
}

bool PointToPoint::idle() const noexcept {
  return std::all_of(lanes_.begin(), lanes_.end(), [](const Lane& l) { return l.sends.empty() && l.recvs.empty(); });
}

/// "send #3 rank 0 (hostA): send to rank 2 (hostB)".
std::string PointToPoint::where(const Transfer& t, int peer, bool send) const {
  auto host = [&](int rank) { return std::to_string(rank) + " (" + comm_.hosts()[static_cast<size_t>(rank)] + ")"; };
  return std::string(send ? "send #" : "recv #") + std::to_string(t.signature.sequence) + " rank " +
         host(comm_.rank()) + (send ? ": send to rank " : ": recv from rank ") + host(peer);
}

void PointToPoint::fail_all(const Error& error) {
  const std::string why = error.what();
  for (int peer = 0; peer < static_cast<int>(lanes_.size()); ++peer) {
    Lane& lane = lanes_[static_cast<size_t>(peer)];
    for (auto* list : {&lane.sends, &lane.recvs}) {
      for (Transfer& t : *list) {
        if (t.work->done()) continue;
        const std::string what = where(t, peer, list == &lane.sends);
        const bool own = why.rfind(what, 0) == 0;
        t.work->complete(std::make_exception_ptr(Error(error.kind(), own ? why : what + ": " + why)));
      }
      list->clear();
    }
  }
}

/// Moves everything along until `until` is done (null: until nothing is left). The lock is let go between rounds.
void PointToPoint::drive(std::unique_lock<std::mutex>& lock, const Work* until) {
  driving_ = true;
  int looks = 0;
  while (until != nullptr ? !until->done() : (!idle() && !stopping_)) {
    bool over = true;  // it failed or was closed before: nobody needs to hear of that from here
    try {
      comm_.check();
      over = false;
      if (round()) {
        looks = 0;
        changed_.notify_all();
      } else if (++looks < patience_.looks) {
        lock.unlock();
        if (looks % 16 == 0) sched_yield();
        lock.lock();
      } else {
        // Endpoints are used by the driver alone, also while it sleeps.
        for (size_t peer = 0; peer < lanes_.size(); ++peer) {
          if (lanes_[peer].sends.empty() && lanes_[peer].recvs.empty()) continue;
          endpoints_[peer]->progress();
          Endpoint& endpoint = *endpoints_[peer];
          lock.unlock();
          endpoint.wait(static_cast<int>(peer), std::chrono::microseconds(500));
          try {
            between_naps();
          } catch (...) {
            lock.lock();
            driving_ = false;
            changed_.notify_all();
            throw;
          }
          lock.lock();
        }
      }
    } catch (const Error& error) {
      if (!over && error.kind() == ErrorKind::peer_lost && comm_.learns_cause()) continue;  // check() throws it
      if (!over) comm_.fail(error, true);
      fail_all(error);
    }
  }
  driving_ = false;
  changed_.notify_all();
}

void PointToPoint::finish(Work& work, double timeout_s) {
  const Deadline deadline = Deadline::after(timeout_s);
  std::unique_lock lock(mutex_);
  for (Lane& lane : lanes_)
    for (auto* list : {&lane.sends, &lane.recvs})
      for (Transfer& t : *list)
        if (t.work.get() == &work && deadline < t.deadline) {
          t.deadline = deadline;
          t.timeout_s = timeout_s;
        }
  while (!work.done()) {
    if (!driving_)
      drive(lock, &work);
    else
      changed_.wait_for(lock, std::chrono::milliseconds(100));
  }
}

void PointToPoint::serve() {
  std::unique_lock lock(mutex_);
  while (!stopping_) {
    if (!driving_ && !idle())
      drive(lock, nullptr);
    else
      changed_.wait(lock);
  }
}

void PointToPoint::stop() {
  {
    std::unique_lock lock(mutex_);
    stopping_ = true;
    fail_all(Error(ErrorKind::error, "the communicator was closed before this transfer was complete"));
    changed_.notify_all();
    changed_.wait(lock, [&] { return !driving_; });  // it uses endpoints that will not live much longer
  }
  if (thread_.joinable()) thread_.join();
}

}  // namespace paracomm
