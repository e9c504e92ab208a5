#include "comm/point_to_point.h"

#include <sched.h>

#include <algorithm>
#include <utility>

#include "core/finally.h"
#include "core/nap.h"

namespace paracomm {
namespace {

constexpr size_t kSlice = 128 * 1024;  // a ring of MemoryOptions::ring_per_peer holds several
// Looks before a nap of a thread that moves messages beside one that computes: the core is better used by that one.
constexpr int kLooksBeside = 64;
constexpr auto kNap = std::chrono::milliseconds(20);  // what it waits for wakes it; clocks are looked at now and then
constexpr auto kShortNap = std::chrono::microseconds(500);  // while another transport may have something, too
constexpr double kFarewell_s = 0.5;  // over TCP, the last messages of a rank may come after the news that it left

}  // namespace

PointToPoint::PointToPoint(Communicator& comm, std::vector<Endpoint*> endpoints, Patience patience)
    : comm_(comm), endpoints_(std::move(endpoints)), patience_(patience), lanes_(endpoints_.size()) {}

std::shared_ptr<Work> PointToPoint::post(std::byte* data, size_t nbytes, DType dtype, int peer, int tag,
                                         double timeout_s, bool send, Work::Finish finish) {
  const bool any = !send && peer == kAnyPeer;
  if (!any && (peer < 0 || peer >= comm_.world_size() || peer == comm_.rank()))
    throw Error(ErrorKind::invalid_argument, std::string(send ? "send to" : "recv from") + " rank " +
                                                 std::to_string(peer) + " on rank " + std::to_string(comm_.rank()) +
                                                 " of " + std::to_string(comm_.world_size()));
  comm_.check_process();
  auto work = std::make_shared<Work>(shared_from_this(), std::move(finish));
  Transfer transfer;
  transfer.work = work;
  transfer.data = data;
  transfer.nbytes = nbytes;
  transfer.timeout_s = timeout_s >= 0 ? timeout_s : comm_.options().timeout_s;
  transfer.deadline = Deadline::after(transfer.timeout_s);
  transfer.signature.collective = Collective::send;
  transfer.signature.count = nbytes / size_of(dtype);
  transfer.signature.dtype = dtype;
  transfer.signature.root = tag;
  std::unique_lock lock(mutex_);
  uint32_t& number = any ? received_from_any_
                         : (send ? lanes_[static_cast<size_t>(peer)].sent : lanes_[static_cast<size_t>(peer)].received);
  transfer.signature.sequence = number + 1;
  if (stopping_ || comm_.interruption_.stop.load(std::memory_order_acquire))
    comm_.throw_failure(where(transfer, peer, send));
  ++number;
  transfer.order = ++posted_;
  if (send) {
    lanes_[static_cast<size_t>(peer)].sends.push_back(std::move(transfer));
  } else {
    for (int from = 0; from < static_cast<int>(lanes_.size()); ++from)
      if ((any || from == peer) && (take_aside(from, transfer) || take_incoming(from, transfer))) {
        settle(lock);
        return work;
      }
    (any ? from_any_ : lanes_[static_cast<size_t>(peer)].recvs).push_back(std::move(transfer));
  }
  if (!thread_.joinable()) thread_ = std::thread([this] { serve(); });
  asleep_ != nullptr ? asleep_->nudge() : needed_.notify_one();
  return work;
}

bool PointToPoint::take_aside(int peer, Transfer& recv) {
  std::list<Transfer>& aside = lanes_[static_cast<size_t>(peer)].aside;
  const auto found = std::find_if(aside.begin(), aside.end(),
                                  [&](const Transfer& t) { return t.signature.root == recv.signature.root; });
  if (found == aside.end()) return false;
  const Transfer message = std::move(*found);
  aside.erase(found);
  fail_unless_fit(peer, recv, message.signature);
  std::copy(message.aside.begin(), message.aside.end(), recv.data);
  recv.work->set_source(peer);
  over_.emplace_back(recv.work, nullptr);
  return true;
}

bool PointToPoint::take_incoming(int peer, const Transfer& recv) {
  std::optional<Transfer>& message = lanes_[static_cast<size_t>(peer)].incoming;
  if (!message || message->work || message->signature.root != recv.signature.root) return false;
  fail_unless_fit(peer, recv, message->signature);
  recv.work->set_source(peer);
  recv.work->begin();
  message->work = recv.work;
  message->meant_for = recv.data;  // an endpoint may be in the middle of a slice, and writes where it was told to
  message->timeout_s = recv.timeout_s;
  message->deadline = recv.deadline;
  return true;
}

void PointToPoint::fail_unless_fit(int peer, const Transfer& recv, const Signature& head) {
  try {
    check_fit(peer, recv, head);
  } catch (const Error& error) {
    comm_.fail(error, true);
    throw;
  }
}

void PointToPoint::check_fit(int peer, const Transfer& recv, const Signature& head) const {
  Signature expected = recv.signature;
  expected.sequence = head.sequence;  // its number among the sender's says nothing about ours
  if (head == expected) return;
  throw Error(ErrorKind::mismatch,
              where(recv, peer, false) + ": it sends " + describe(head) + " (" + difference(expected, head) + ")");
}

PointToPoint::Transfer PointToPoint::match(int peer, const Signature& head) {
  std::list<Transfer>& recvs = lanes_[static_cast<size_t>(peer)].recvs;
  const auto fits = [&](const Transfer& t) { return t.signature.root == head.root; };
  const auto own = std::find_if(recvs.begin(), recvs.end(), fits);
  const auto any = std::find_if(from_any_.begin(), from_any_.end(), fits);
  const bool take_any = any != from_any_.end() && (own == recvs.end() || any->order < own->order);
  Transfer taken;
  if (take_any || own != recvs.end()) {
    check_fit(peer, take_any ? *any : *own, head);
    taken = std::move(take_any ? *any : *own);
    take_any ? from_any_.erase(any) : recvs.erase(own);
    taken.work->set_source(peer);
  } else {
    taken.nbytes = head.count * size_of(head.dtype);
    taken.aside.resize(taken.nbytes);
    taken.data = taken.aside.data();
    taken.timeout_s = comm_.options().timeout_s;
    taken.deadline = Deadline::after(taken.timeout_s);
  }
  taken.signature = head;
  return taken;
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
    if (!t.started) t.work->begin();
    t.moved += n;
    t.started = moved = true;
  }
  if (t.by_reference && !endpoint.sent(peer, t.last_index)) return moved;
  t.work->complete();
  return true;
}

bool PointToPoint::advance_recv(int peer, Transfer& t) {
  Endpoint& endpoint = *endpoints_[static_cast<size_t>(peer)];
  while (t.moved < t.nbytes || !t.started) {
    const size_t n = std::min(kSlice, t.nbytes - t.moved);
    const std::byte* bytes = endpoint.try_recv(peer, t.signature, n, t.data + t.moved);
    if (bytes == nullptr) return false;
    if (!t.started && t.work) t.work->begin();
    void* dst = t.data + t.moved;
    if (n > 0) copy_bytes(&dst, 1, bytes, n);
    endpoint.release(peer);
    t.moved += n;
    t.started = true;
  }
  return true;
}

bool PointToPoint::advance_recvs(int peer) {
  Lane& lane = lanes_[static_cast<size_t>(peer)];
  bool moved = false;
  while (true) {
    if (!lane.incoming) {
      Signature head;
      if (lane.recvs.empty() && from_any_.empty()) return moved;
      if (endpoints_[static_cast<size_t>(peer)] == nullptr || (lane.ended && lane.recvs.empty())) return moved;
      try {
        if (!endpoints_[static_cast<size_t>(peer)]->peek(peer, head)) return moved;
      } catch (const Error& error) {
        // Whoever may also hear from others goes on: if the peer died, and did not just leave, the control plane says
        // so.
        if (error.kind() != ErrorKind::peer_lost || !lane.recvs.empty()) throw;
        lane.ended = true;
        return moved;
      }
      lane.incoming = match(peer, head);
      moved = true;
    }
    const size_t before = lane.incoming->moved;
    const bool complete = advance_recv(peer, *lane.incoming);
    moved |= complete || lane.incoming->moved != before;
    if (!complete) return moved;
    if (lane.incoming->meant_for != nullptr)
      std::copy(lane.incoming->aside.begin(), lane.incoming->aside.end(), lane.incoming->meant_for);
    if (lane.incoming->work)
      over_.emplace_back(lane.incoming->work, nullptr);
    else
      lane.aside.push_back(std::move(*lane.incoming));
    lane.incoming.reset();
  }
}

bool PointToPoint::round() {
  bool moved = false;
  for (int peer = 0; peer < static_cast<int>(lanes_.size()); ++peer) {
    Lane& lane = lanes_[static_cast<size_t>(peer)];
    const bool left = comm_.interruption_.left[static_cast<size_t>(peer)].load(std::memory_order_acquire);
    try {
      while (!lane.sends.empty()) {
        Transfer& t = lane.sends.front();
        if (!t.work->done()) moved |= advance_send(peer, t);
        if (!t.work->done()) break;
        lane.sends.pop_front();
      }
      moved |= advance_recvs(peer);
    } catch (const Error& error) {
      if (error.kind() != ErrorKind::peer_lost || !comm_.interruption_.has_left(peer)) throw;
      throw_left(peer);
    }
    const bool pending = !lane.idle() || !from_any_.empty();
    if (left && pending && (moved || !lane.farewell)) lane.farewell = Deadline::after(kFarewell_s);
    if (!lane.sends.empty()) look_at_clock(peer, lane.sends.front(), true);
    if (lane.incoming) look_at_clock(peer, *lane.incoming, false);
    for (const Transfer& t : lane.recvs) look_at_clock(peer, t, false);
  }
  for (const Transfer& t : from_any_) look_at_clock(kAnyPeer, t, false);
  return moved;
}

void PointToPoint::throw_left(int peer) const {
  const Lane& lane = lanes_[static_cast<size_t>(peer)];
  const bool send = !lane.sends.empty();
  const Transfer& t = send ? lane.sends.front() : lane.incoming ? *lane.incoming : lane.recvs.front();
  throw Error(ErrorKind::peer_lost, where(t, peer, send) + ", which has closed its communicator");
}

void PointToPoint::look_at_clock(int peer, const Transfer& t, bool send) {
  const auto gone = [&](const Lane& lane) { return lane.farewell && lane.farewell->expired(); };
  bool alone = peer == kAnyPeer;
  for (int r = 0; alone && r < static_cast<int>(lanes_.size()); ++r)
    alone = r == comm_.rank() || gone(lanes_[static_cast<size_t>(r)]);
  if (alone || (peer != kAnyPeer && gone(lanes_[static_cast<size_t>(peer)])))
    throw Error(ErrorKind::peer_lost,
                where(t, peer, send) + (alone ? ", and all of them have" : ", which has") + " closed its communicator");
  if (t.deadline.expired())
    throw Error(ErrorKind::timeout, where(t, peer, send) + " timed out after " + std::to_string(t.timeout_s) +
                                        " s, the timeout of this call");
}

bool PointToPoint::idle() const noexcept {
  return from_any_.empty() && std::all_of(lanes_.begin(), lanes_.end(), [](const Lane& l) { return l.idle(); });
}

template <class Visit>
void PointToPoint::each_transfer(Visit visit) {
  for (int peer = 0; peer < static_cast<int>(lanes_.size()); ++peer) {
    Lane& lane = lanes_[static_cast<size_t>(peer)];
    for (Transfer& t : lane.sends) visit(peer, t, true);
    for (Transfer& t : lane.recvs) visit(peer, t, false);
    if (lane.incoming) visit(peer, *lane.incoming, false);
  }
  for (Transfer& t : from_any_) visit(kAnyPeer, t, false);
}

/// "send #3 rank 0 (hostA): send to rank 2 (hostB)".
std::string PointToPoint::where(const Transfer& t, int peer, bool send) const {
  auto host = [&](int rank) { return std::to_string(rank) + " (" + comm_.hosts()[static_cast<size_t>(rank)] + ")"; };
  return std::string(send ? "send #" : "recv #") + std::to_string(t.signature.sequence) + " rank " +
         host(comm_.rank()) + (send ? ": send to " : ": recv from ") +
         (peer == kAnyPeer ? "any rank" : "rank " + host(peer));
}

void PointToPoint::fail_all(const Error& error) {
  const std::string why = error.what();
  each_transfer([&](int peer, Transfer& t, bool send) {
    if (!t.work || t.work->done()) return;
    const std::string what = where(t, peer, send);
    const bool own = why.rfind(what, 0) == 0;
    over_.emplace_back(t.work, std::make_exception_ptr(Error(error.kind(), own ? why : what + ": " + why)));
  });
  for (Lane& lane : lanes_) {
    lane.sends.clear();
    lane.recvs.clear();
    lane.incoming.reset();
  }
  from_any_.clear();
}

void PointToPoint::settle(std::unique_lock<std::mutex>& lock) {
  if (over_.empty()) return;
  const auto over = std::exchange(over_, {});
  lock.unlock();
  for (const auto& [work, error] : over) work->complete(error);
  lock.lock();
  changed_.notify_all();
}

/// Moves everything along until `until` is done (null: until nothing is left, or somebody waits and does it better).
/// The lock is let go between rounds.
void PointToPoint::drive(std::unique_lock<std::mutex>& lock, const Work* until) {
  driving_ = true;
  const Finally leave{[this] {
    driving_ = false;
    changed_.notify_all();
    needed_.notify_one();
  }};
  const int patience = until != nullptr ? patience_.looks : std::min(kLooksBeside, patience_.looks);
  int looks = 0;
  while (until != nullptr ? !until->done() : (!idle() && !stopping_ && waiting_ == 0)) {
    bool over = true;  // it failed or was closed before: nobody needs to hear of that from here
    try {
      comm_.check();
      over = false;
      const bool moved = round();
      settle(lock);
      if (moved) {
        looks = 0;
        changed_.notify_all();
      } else if (++looks < patience) {
        lock.unlock();
        if (looks % 16 == 0) sched_yield();
        lock.lock();
      } else {
        nap(lock);
      }
    } catch (const Error& error) {
      if (!over && error.kind() == ErrorKind::peer_lost && comm_.learns_cause()) continue;  // check() throws it
      if (!over) comm_.fail(error, true);
      fail_all(error);
    }
    settle(lock);
  }
}

/// Waits until one of the endpoints with something posted may have news, somebody posts or waits, or for a while.
void PointToPoint::nap(std::unique_lock<std::mutex>& lock) {
  const auto pending = [this](size_t peer) {
    return endpoints_[peer] != nullptr && (!from_any_.empty() || !lanes_[peer].idle());
  };
  std::vector<Endpoint*> endpoints;
  for (size_t peer = 0; peer < lanes_.size(); ++peer)
    if (pending(peer) && std::find(endpoints.begin(), endpoints.end(), endpoints_[peer]) == endpoints.end())
      endpoints.push_back(endpoints_[peer]);
  for (Endpoint* endpoint : endpoints) {
    pending_.clear();
    for (size_t peer = 0; peer < lanes_.size(); ++peer)
      if (endpoints_[peer] == endpoint && pending(peer)) pending_.push_back(static_cast<int>(peer));
    endpoint->progress();
    asleep_ = endpoint;
    lock.unlock();  // endpoints are used by the driver alone, also while it sleeps
    const Finally wake{[&] {
      lock.lock();
      asleep_ = nullptr;
    }};
    endpoint->wait_any(pending_, endpoints.size() == 1 ? kNap : kShortNap);
    between_naps();
  }
}

void PointToPoint::finish(Work& work, double timeout_s) {
  check_process(generation_);  // the communicator may be gone, if this work is done by now
  const Deadline deadline = Deadline::after(timeout_s);
  std::unique_lock lock(mutex_);
  each_transfer([&](int, Transfer& t, bool) {
    if (t.work.get() != &work || !(deadline < t.deadline)) return;
    t.deadline = deadline;
    t.timeout_s = timeout_s;
  });
  if (work.done()) return;
  ++waiting_;
  const Finally leave{[this] {
    if (--waiting_ == 0) needed_.notify_one();
  }};
  if (asleep_ != nullptr) asleep_->nudge();  // a thread that moves messages beside us makes way
  while (!work.done()) {
    if (!driving_) {
      drive(lock, &work);
    } else {
      changed_.wait_for(lock, std::chrono::milliseconds(100));
      lock.unlock();
      const Finally relock{[&] { lock.lock(); }};
      between_naps();
    }
  }
}

void PointToPoint::serve() {
  std::unique_lock lock(mutex_);
  while (!stopping_) {
    if (!driving_ && !idle() && waiting_ == 0)
      drive(lock, nullptr);
    else
      needed_.wait(lock);
  }
}

void PointToPoint::stop() {
  {
    std::unique_lock lock(mutex_);
    stopping_ = true;
    fail_all(Error(ErrorKind::error, "the communicator was closed before this transfer was complete"));
    settle(lock);
    changed_.notify_all();
    needed_.notify_one();
    if (asleep_ != nullptr) asleep_->nudge();
    changed_.wait(lock, [&] { return !driving_; });  // it uses endpoints that will not live much longer
  }
  if (thread_.joinable()) thread_.join();
}

}  // namespace paracomm
