#include "comm/communicator.h"

#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <iterator>

#include "comm/point_to_point.h"
#include "comm/queue.h"
#include "executor/where.h"

namespace paracomm {

struct Communicator::LocalGroup {
  std::mutex mutex;
  std::vector<Communicator*> members;
};

namespace {

constexpr double kCause_s = 0.2;  // a peer that left on somebody else's death is seen before that death, at times

// On one host a tile should stay in the second-level cache: of windows from 128 KiB to 4 MiB (with staging of four
// times as much), 256 to 384 KiB gave the best times for 1 to 64 MiB at 2 ranks, 1.4 times better than 2 MiB. Between
// hosts longer messages pay, and the processor is seldom the limit.
constexpr size_t kHostWindow = 320 << 10;
constexpr size_t kPointToPointRing = 512 << 10;
constexpr size_t kNetworkWindow = 4 << 20;

// Where ranks share cores, waiting means handing the core on: fewer, longer turns.
constexpr int kCrowdedLag = 4;

constexpr size_t kMostStaging = 1 << 30;  // as kOptionRanges says

/// The pages are there from the start (see Segment).
void check_memory(size_t staging_bytes, int local_ranks) {
  const auto all =
      static_cast<size_t>(std::max(sysconf(_SC_PHYS_PAGES), 1L)) * static_cast<size_t>(sysconf(_SC_PAGESIZE));
  if (staging_bytes <= all / 2 / static_cast<size_t>(local_ranks)) return;
  throw Error(ErrorKind::invalid_argument, "staging_bytes is " + std::to_string(staging_bytes) + " for each of " +
                                               std::to_string(local_ranks) + " ranks of this host, expected at most " +
                                               std::to_string(all / 2 / static_cast<size_t>(local_ranks)) +
                                               ", half of its memory in all");
}

/// Some host has more ranks than cores.
bool is_crowded(const std::vector<Address>& addresses) {
  return std::any_of(addresses.begin(), addresses.end(), [&](const Address& a) {
    return a.cpu_count > 0 && std::count_if(addresses.begin(), addresses.end(),
                                            [&](const Address& b) { return b.host_id == a.host_id; }) > a.cpu_count;
  });
}

}  // namespace

void check_options(const CommOptions& options) {
  if (!(options.timeout_s > 0))
    throw Error(ErrorKind::invalid_argument,
                "timeout_s is " + std::to_string(options.timeout_s) + ", expected a number of seconds above 0");
  const size_t values[] = {options.window_bytes, options.staging_bytes, static_cast<size_t>(options.lag),
                           static_cast<size_t>(options.sockets_per_peer), static_cast<size_t>(options.cores)};
  for (size_t i = 0; i < std::size(values); ++i) {
    const OptionRange& range = kOptionRanges[i];
    if (values[i] == 0 ||
        (values[i] >= static_cast<size_t>(range.least) && values[i] <= static_cast<size_t>(range.most)))
      continue;
    throw Error(ErrorKind::invalid_argument, std::string(range.name) + " is " + std::to_string(values[i]) +
                                                 ", expected " + std::to_string(range.least) + " to " +
                                                 std::to_string(range.most) + ", or 0 for the default");
  }
}

Communicator::Communicator(int rank, int world_size, const CommOptions& options, std::vector<std::string> hosts)
    : rank_(rank),
      world_size_(world_size),
      options_(options),
      hosts_(std::move(hosts)),
      generation_(fork_generation()),
      plans_([this](const Program&, Shape& shape) {
        shape.window_bytes = options_.window_bytes;
        shape.lag = options_.lag;
      }),
      device_plans_([this](const Program& program, Shape& shape) {
        shape.window_bytes = device_->window_bytes(program, shape);
      }) {
  check_options(options_);
  if (options_.cores == 0) options_.cores = usable_cpus();
  if (options_.sockets_per_peer == 0) options_.sockets_per_peer = 1;
  interruption_.stuck = [this](const Signature& signature) { tell_waiting(signature); };
  interruption_.left = std::make_unique<std::atomic<bool>[]>(static_cast<size_t>(world_size));
}

void Communicator::size_windows(bool network, bool crowded) {
  if (options_.window_bytes == 0) options_.window_bytes = network ? kNetworkWindow : kHostWindow;
  if (options_.lag == 0) options_.lag = crowded ? kCrowdedLag : 1;
  // Tiles under way need a window for each time of the lag, two more, and one to spare.
  const auto windows = static_cast<size_t>(options_.lag) + 3;
  if (options_.staging_bytes == 0) options_.staging_bytes = std::min(windows * options_.window_bytes, kMostStaging);
  options_.window_bytes = std::min(options_.window_bytes, options_.staging_bytes / windows);
}

void Communicator::History::add(const Signature& signature) noexcept {
  uint64_t words[kWords];
  std::memcpy(words, &signature, sizeof signature);
  auto& entry = words_[signature.sequence % kEntries];
  // The first word holds the number: 0, which no operation has, while the others change.
  entry[0].store(0, std::memory_order_relaxed);
  for (size_t i = 1; i < kWords; ++i) entry[i].store(words[i], std::memory_order_release);
  entry[0].store(words[0], std::memory_order_release);
}

std::optional<Signature> Communicator::History::find(uint32_t sequence) const noexcept {
  const auto& entry = words_[sequence % kEntries];
  uint64_t words[kWords];
  for (size_t i = 0; i < kWords; ++i) words[i] = entry[i].load(std::memory_order_acquire);
  Signature found;
  std::memcpy(&found, words, sizeof found);
  if (found.sequence != sequence || entry[0].load(std::memory_order_relaxed) != words[0]) return std::nullopt;
  return found;
}

Patience Communicator::patience() const {
  // A rank that spins on a core that its peer needs keeps the peer from answering.
  if (static_cast<int>(local_ranks_.size()) > options_.cores) return {5, 2000, 1};
  return {};
}

void Communicator::start(std::vector<std::unique_ptr<Endpoint>> endpoints, std::vector<int> which,
                         std::vector<std::unique_ptr<Endpoint>> p2p_endpoints) {
  endpoints_ = std::move(endpoints);
  p2p_endpoints_ = std::move(p2p_endpoints);
  which_ = std::move(which);
  std::vector<Endpoint*> by_rank, p2p_by_rank;
  for (int which_one : which_) {
    by_rank.push_back(which_one < 0 ? nullptr : endpoints_[static_cast<size_t>(which_one)].get());
    p2p_by_rank.push_back(which_one < 0 ? nullptr : p2p_endpoints_[static_cast<size_t>(which_one)].get());
  }
  executor_ = std::make_unique<HostExecutor>(rank_, by_rank, hosts_, patience(), interruption_);
  queue_ = std::make_shared<CollectiveQueue>(*this);
  p2p_ = std::make_shared<PointToPoint>(*this, p2p_by_rank, patience());
}

std::shared_ptr<Communicator> Communicator::connect(int rank, Listener& listener, const std::vector<std::string>& blobs,
                                                    const CommOptions& options, Deadline deadline) {
  const int world_size = static_cast<int>(blobs.size());
  if (rank < 0 || rank >= world_size)
    throw Error(ErrorKind::invalid_argument,
                "rank " + std::to_string(rank) + " is not in a world of " + std::to_string(world_size));
  std::vector<Address> addresses;
  std::vector<std::string> hosts;
  for (const std::string& blob : blobs) {
    addresses.push_back(Address::parse(blob));
    hosts.push_back(addresses.back().hostname);
  }
  std::shared_ptr<Communicator> comm(new Communicator(rank, world_size, options, hosts));
  for (int r = 0; r < world_size; ++r) {
    const auto first =
        std::find_if(addresses.begin(), addresses.end(),
                     [&](const Address& a) { return a.host_id == addresses[static_cast<size_t>(r)].host_id; }) -
        addresses.begin();
    comm->host_indices_.push_back(
        first == r ? (r == 0 ? 0 : *std::max_element(comm->host_indices_.begin(), comm->host_indices_.end()) + 1)
                   : comm->host_indices_[static_cast<size_t>(first)]);
  }
  for (int r = 0; r < world_size; ++r)
    if (comm->host_indices_[static_cast<size_t>(r)] == comm->host_indices_[static_cast<size_t>(rank)])
      comm->local_ranks_.push_back(r);
  const int n_local = static_cast<int>(comm->local_ranks_.size());
  auto local_rank = [&](int r) {
    return static_cast<int>(std::find(comm->local_ranks_.begin(), comm->local_ranks_.end(), r) -
                            comm->local_ranks_.begin());
  };

  comm->size_windows(n_local < world_size, is_crowded(addresses));
  if (n_local > 1) check_memory(comm->options_.staging_bytes, n_local);
  std::vector<PeerSockets> sockets = listener.connect(rank, blobs, deadline, comm->options_.sockets_per_peer + 1);
  // Collectives and point-to-point have a queue of their own each: neither waits for the other's order.
  const MemoryOptions memory{comm->options_.staging_bytes, false},
      p2p_memory{kPointToPointRing * static_cast<size_t>(std::max(n_local - 1, 1)), true};
  std::vector<int> which(static_cast<size_t>(world_size), -1);
  std::vector<std::unique_ptr<Endpoint>> endpoints, p2p_endpoints;
  if (n_local > 1) {
    auto own = std::make_shared<Segment>(n_local, memory, true);
    auto p2p_own = std::make_shared<Segment>(n_local, p2p_memory, true);
    for (const PeerSockets& peer : sockets)
      if (peer.same_host)
        for (int fd : {own->fd(), p2p_own->fd(), Arena::process().mapping().fd()}) send_fd(peer.control, fd, deadline);
    own->drop_fd();
    p2p_own->drop_fd();
    std::vector<MemoryPeer> peers, p2p_peers;
    for (const PeerSockets& peer : sockets) {
      if (!peer.same_host) continue;
      auto segment = std::make_shared<Segment>(n_local, memory, recv_fd(peer.control, deadline));
      auto p2p_segment = std::make_shared<Segment>(n_local, p2p_memory, recv_fd(peer.control, deadline));
      auto arena = map_shared(recv_fd(peer.control, deadline));
      peers.push_back({peer.rank, local_rank(peer.rank), std::move(segment), arena});
      p2p_peers.push_back({peer.rank, local_rank(peer.rank), std::move(p2p_segment), arena});
      which[static_cast<size_t>(peer.rank)] = static_cast<int>(endpoints.size());
    }
    const int mine = local_rank(rank);
    endpoints.push_back(
        std::make_unique<MemoryEndpoint>(MemoryPeer{rank, mine, own, nullptr}, std::move(peers), world_size, memory));
    p2p_endpoints.push_back(std::make_unique<MemoryEndpoint>(MemoryPeer{rank, mine, p2p_own, nullptr},
                                                             std::move(p2p_peers), world_size, p2p_memory));
  }
  if (n_local < world_size) {
    std::vector<TcpPeer> peers, p2p_peers;
    for (PeerSockets& peer : sockets) {
      if (peer.same_host) continue;
      std::vector<Fd> last;
      last.push_back(std::move(peer.data.back()));
      peer.data.pop_back();
      peers.push_back({peer.rank, peer.hostname, std::move(peer.data)});
      p2p_peers.push_back({peer.rank, peer.hostname, std::move(last)});
      which[static_cast<size_t>(peer.rank)] = static_cast<int>(endpoints.size());
    }
    endpoints.push_back(std::make_unique<TcpEndpoint>(rank, world_size, std::move(peers)));
    p2p_endpoints.push_back(std::make_unique<TcpEndpoint>(rank, world_size, std::move(p2p_peers)));
  }
  comm->start(std::move(endpoints), std::move(which), std::move(p2p_endpoints));
  std::vector<ControlLink> links;
  for (PeerSockets& peer : sockets) links.push_back({peer.rank, std::move(peer.control), peer.hostname});
  comm->control_ = std::make_shared<ControlPlane>(rank, std::move(links),
                                                  [raw = comm.get()](const PeerEvent& event) { raw->on_event(event); });
  return comm;
}

std::vector<std::shared_ptr<Communicator>> Communicator::local(int world_size, const CommOptions& options) {
  if (world_size < 1 || world_size > kMostThreads)
    throw Error(ErrorKind::invalid_argument, "world_size of ranks that are threads is " + std::to_string(world_size) +
                                                 ", expected 1 to " + std::to_string(kMostThreads));
  auto group = std::make_shared<LocalGroup>();
  std::vector<std::shared_ptr<Communicator>> comms;
  for (int r = 0; r < world_size; ++r) {
    const std::vector<std::string> hosts(static_cast<size_t>(world_size), "thread");
    comms.emplace_back(new Communicator(r, world_size, options, hosts));
    comms.back()->size_windows(false, false);
  }
  const MemoryOptions memory{comms[0]->options_.staging_bytes, false};
  std::vector<std::shared_ptr<Segment>> segments, p2p_segments;
  for (int r = 0; r < world_size; ++r) {
    segments.push_back(std::make_shared<Segment>(world_size, memory, false));
    p2p_segments.push_back(std::make_shared<Segment>(world_size, memory, false));
  }
  for (int r = 0; r < world_size; ++r) {
    const std::shared_ptr<Communicator>& comm = comms[static_cast<size_t>(r)];
    std::vector<MemoryPeer> peers, p2p_peers;
    std::vector<int> which(static_cast<size_t>(world_size), 0);
    which[static_cast<size_t>(r)] = -1;
    for (int p = 0; p < world_size; ++p) {
      comm->local_ranks_.push_back(p);
      comm->host_indices_.push_back(0);
      if (p == r) continue;
      peers.push_back({p, p, segments[static_cast<size_t>(p)], nullptr});
      p2p_peers.push_back({p, p, p2p_segments[static_cast<size_t>(p)], nullptr});
    }
    std::vector<std::unique_ptr<Endpoint>> endpoints, p2p_endpoints;
    endpoints.push_back(std::make_unique<MemoryEndpoint>(MemoryPeer{r, r, segments[static_cast<size_t>(r)], nullptr},
                                                         std::move(peers), world_size, memory));
    p2p_endpoints.push_back(std::make_unique<MemoryEndpoint>(
        MemoryPeer{r, r, p2p_segments[static_cast<size_t>(r)], nullptr}, std::move(p2p_peers), world_size, memory));
    comm->start(std::move(endpoints), std::move(which), std::move(p2p_endpoints));
    comm->group_ = group;
    group->members.push_back(comm.get());
  }
  return comms;
}

Communicator::~Communicator() {
  if (generation_ == fork_generation()) {
    close();
  } else {
    // A forked child has none of the threads: to join them is to wait for ever.
    static_cast<void>(new auto(std::move(queue_)));
    static_cast<void>(new auto(std::move(p2p_)));
    static_cast<void>(new auto(std::move(device_)));
  }
}

void Communicator::close() {
  if (generation_ != fork_generation()) return;  // a forked child owns none of this
  // First of all, while failures of others are still heard of: it waits until peers have read what this rank sent.
  if (device_) device_->close();
  std::shared_ptr<ControlPlane> control;
  {
    const std::lock_guard lock(failure_mutex_);
    if (closed_) return;
    closed_ = true;
    control = control_;
  }
  if (control) control->goodbye();
  if (group_) {
    const std::lock_guard lock(group_->mutex);
    std::erase(group_->members, this);
    for (Communicator* member : group_->members)
      member->on_event({rank_, PeerEvent::Kind::left, ErrorKind::peer_lost, "", {}});
  }
  interruption_.stop.store(true, std::memory_order_release);
  for (auto* list : {&endpoints_, &p2p_endpoints_})
    for (auto& endpoint : *list) endpoint->interrupt();
  if (queue_) queue_->stop();
  if (p2p_) p2p_->stop();
  {
    const std::lock_guard lock(failure_mutex_);
    control_.reset();
  }
  // The last owner waits for the control thread, so it must not be that thread, which tells of a failure at times.
  while (control && control.use_count() > 1) std::this_thread::sleep_for(std::chrono::milliseconds(1));
  control.reset();
  for (auto* list : {&endpoints_, &p2p_endpoints_})
    for (auto& endpoint : *list) endpoint->close();
}

void Communicator::on_event(const PeerEvent& event) {
  const std::string who = "rank " + std::to_string(event.peer) + " (" + hosts_[static_cast<size_t>(event.peer)] + ")";
  switch (event.kind) {
    case PeerEvent::Kind::left:
      interruption_.left[static_cast<size_t>(event.peer)].store(true, std::memory_order_release);
      break;
    case PeerEvent::Kind::lost:
      fail(Error(ErrorKind::peer_lost, event.text.empty() ? who + " died" : event.text), false);
      break;
    case PeerEvent::Kind::aborted:
      fail(Error(event.error_kind, who + " gave up: " + event.text), false);
      break;
    case PeerEvent::Kind::waiting:
      if (const auto error = contradiction(event.peer, event.signature, rank_, history_)) fail(*error, true);
      break;
  }
}

void Communicator::tell_waiting(const Signature& signature) {
  if (control_) control_->broadcast_waiting(signature);
  if (!group_) return;
  std::optional<Error> error;
  {
    const std::lock_guard lock(group_->mutex);
    for (Communicator* member : group_->members)
      if (!error) error = contradiction(rank_, signature, member->rank_, member->history_);
  }
  if (error) fail(*error, true);
}

std::optional<Error> Communicator::contradiction(int one, const Signature& waiting, int other,
                                                 const History& called) const {
  const std::optional<Signature> found = called.find(waiting.sequence);
  if (!found || *found == waiting) return std::nullopt;
  const auto who = [&](int rank) {
    return "rank " + std::to_string(rank) + " (" + hosts_[static_cast<size_t>(rank)] + ")";
  };
  return Error(ErrorKind::mismatch, who(one) + " waits in " + describe(waiting) + ", " + who(other) + " called " +
                                        describe(*found) + " (" + difference(waiting, *found) + ")");
}

void Communicator::fail(const Error& error, bool tell) {
  std::shared_ptr<ControlPlane> control;
  {
    const std::lock_guard lock(failure_mutex_);
    if (failure_) return;
    failure_ = error;
    if (tell) control = control_;
  }
  interruption_.stop.store(true, std::memory_order_release);
  for (auto* list : {&endpoints_, &p2p_endpoints_})
    for (auto& endpoint : *list) endpoint->interrupt();
  if (!tell) return;
  if (control) control->broadcast_abort(error.kind(), error.what());
  if (group_) {
    const std::lock_guard lock(group_->mutex);
    for (Communicator* member : group_->members)
      if (member != this) member->on_event({rank_, PeerEvent::Kind::aborted, error.kind(), error.what(), {}});
  }
}

bool Communicator::learns_cause() const {
  const Deadline deadline = Deadline::after(control_ ? kCause_s : 0);
  while (!interruption_.stop.load(std::memory_order_acquire)) {
    if (deadline.expired()) return false;
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  return true;
}

void Communicator::abort(const std::string& why) {
  check_process();
  fail(Error(ErrorKind::error, why), true);
}

void check_process(int generation) {
  if (generation != fork_generation())
    throw Error(ErrorKind::error, "this communicator belongs to the parent process; a forked child cannot use it");
}

void Communicator::check() const {
  check_process();
  if (interruption_.stop.load(std::memory_order_acquire)) throw_failure("rank " + std::to_string(rank_));
}

void Communicator::throw_failure(const std::string& context) const {
  const std::lock_guard lock(failure_mutex_);
  if (failure_) throw Error(failure_->kind(), context + ": " + failure_->what());
  throw Error(ErrorKind::error, context + ": this communicator is closed");
}

int Communicator::add_program(Program program) {
  if (program.world_size != world_size_ || program.rank != rank_)
    throw Error(ErrorKind::invalid_argument, "program of rank " + std::to_string(program.rank) + " of " +
                                                 std::to_string(program.world_size) + " given to rank " +
                                                 std::to_string(rank_) + " of " + std::to_string(world_size_));
  check_ranges(program);
  check_process();
  const auto lock = queue_->lock();
  programs_.push_back(std::make_shared<const Program>(std::move(program)));
  return static_cast<int>(programs_.size()) - 1;
}

void Communicator::set_choice(Collective collective, int root, std::vector<std::pair<size_t, int>> entries) {
  auto& stored = choices_[{static_cast<int>(collective), root}];
  stored = std::move(entries);
  if (collective == Collective::all_reduce && root < 0) all_reduce_choice_ = &stored;
}

int Communicator::choose(Collective collective, int root, size_t nbytes) const noexcept {
  const std::vector<std::pair<size_t, int>>* entries = nullptr;
  if (collective == Collective::all_reduce) {
    entries = all_reduce_choice_;
  } else if (const auto it = choices_.find({static_cast<int>(collective), root}); it != choices_.end()) {
    entries = &it->second;
  }
  if (entries == nullptr) return -1;
  for (const auto& [max_nbytes, program] : *entries)
    if (nbytes <= max_nbytes) return program;
  return entries->empty() ? -1 : entries->back().second;
}

const Plan& Communicator::plan(const Call& call, const Program& program, bool idle) {
  return *plans_.get(call, program, idle);
}

const std::shared_ptr<const Program>& Communicator::check_program(const Call& call) const {
  const bool known = call.program >= 0 && call.program < static_cast<int>(programs_.size());
  if (interruption_.stop.load(std::memory_order_acquire))
    throw_failure(known ? where(*programs_[static_cast<size_t>(call.program)], sequence_ + 1)
                        : "rank " + std::to_string(rank_));
  if (!known) throw Error(ErrorKind::invalid_argument, "no program " + std::to_string(call.program));
  return programs_[static_cast<size_t>(call.program)];
}

Signature Communicator::sign(const Call& call, const Program& program, Processor processor) {
  Signature signature;
  signature.sequence = ++sequence_;
  signature.schedule = program.fingerprint;
  signature.collective = program.collective;
  signature.dtype = call.dtype;
  signature.op = call.op;
  signature.processor = processor;
  signature.root = program.root;
  signature.count = call.count;
  if (program.collective == Collective::all_to_all && !call.blocks.empty()) {
    signature.count = call.largest_block;
  } else if (!call.blocks.empty()) {
    size_t hash = 0;
    for (size_t block : call.blocks) hash = mix(hash, block);
    signature.count = hash;
  }
  return signature;
}

void Communicator::check_memory_of(const Call& call, const Plan& plan) const {
  const bool no_input = call.input == nullptr && plan.reads_input();
  if (!no_input && (call.output != nullptr || !plan.writes_output())) return;
  throw Error(ErrorKind::invalid_argument,
              "rank " + std::to_string(rank_) + " was given no memory for its " + (no_input ? "input" : "output"));
}

Job Communicator::prepare(const Call& call, bool idle) {
  const std::shared_ptr<const Program>& program = check_program(call);
  Job job;
  job.plan = &plan(call, *program, idle);
  check_memory_of(call, *job.plan);
  job.program = program.get();
  job.reduce = select_reduce(call.dtype, call.op == ReduceOp::avg && world_size_ == 1 ? ReduceOp::sum : call.op);
  job.divisor = call.op == ReduceOp::avg ? world_size_ : 1;
  job.input = static_cast<const std::byte*>(call.input);
  job.output = static_cast<std::byte*>(call.output);
  job.timeout_s = call.timeout_s >= 0 ? call.timeout_s : options_.timeout_s;
  job.deadline = Deadline::after(job.timeout_s);
  job.signature = sign(call, *program, Processor::host);
  return job;
}

void Communicator::check_peers_are_here(const Program& program, const Plan& plan) const {
  const auto check = [&](int32_t peer) {
    if (peer < 0 || !interruption_.left[static_cast<size_t>(peer)].load(std::memory_order_acquire)) return;
    throw Error(ErrorKind::peer_lost, where(program, sequence_ + 1) + ": rank " + std::to_string(peer) + " (" +
                                          hosts_[static_cast<size_t>(peer)] + ") has closed its communicator");
  };
  for (const Instruction& instruction : plan.instructions()) {
    for (const Source& source : instruction.sources) check(source.peer);
    for (const Destination& to : instruction.sends) check(to.peer);
  }
}

DeviceJob Communicator::prepare_device(const Call& call) {
  DeviceJob job;
  job.program = check_program(call);
  // Throws where the operation has no meaning.
  select_reduce(call.dtype, call.op == ReduceOp::avg && world_size_ == 1 ? ReduceOp::sum : call.op);
  job.plan = device_plans_.get(call, *job.program, true);
  check_memory_of(call, *job.plan);
  check_peers_are_here(*job.program, *job.plan);
  job.input = call.input;
  job.output = call.output;
  job.dtype = call.dtype;
  job.op = call.op;
  job.divisor = call.op == ReduceOp::avg ? world_size_ : 1;
  job.count = call.count;
  job.timeout_s = call.timeout_s >= 0 ? call.timeout_s : options_.timeout_s;
  job.signature = sign(call, *job.program, Processor::device);
  return job;
}

std::shared_ptr<Work> Communicator::submit_device(const Call& call, uintptr_t stream, Work::Finish finish) {
  check_process();
  if (!device_) throw Error(ErrorKind::error, "this communicator has no device");
  return queue_->submit_device(call, stream, std::move(finish));
}

void Communicator::attach_device(std::shared_ptr<DeviceExecutor> device) {
  check();
  if (device_) throw Error(ErrorKind::error, "this communicator has a device already");
  device_ = std::move(device);
}

DeviceHooks Communicator::device_hooks() {
  DeviceHooks hooks;
  hooks.rank = rank_;
  hooks.hosts = hosts_;
  hooks.host_indices = host_indices_;
  hooks.stopped = &interruption_.stop;
  hooks.left = interruption_.left.get();
  hooks.fail = [this](const Error& error) { fail(error, true); };
  hooks.failure = [this](const std::string& context) {
    try {
      throw_failure(context);
    } catch (...) {
      return std::current_exception();
    }
  };
  hooks.stuck = [this](const Signature& signature) { tell_waiting(signature); };
  return hooks;
}

std::string Communicator::where(const Program& program, uint32_t sequence) const {
  Signature signature;
  signature.sequence = sequence;
  signature.collective = program.collective;
  return name_of_call(signature, program.name, rank_, hosts_[static_cast<size_t>(rank_)]);
}

void Communicator::run_job(Job& job) {
  const auto context = [&] { return where(*job.program, job.signature.sequence); };
  if (interruption_.stop.load(std::memory_order_acquire)) throw_failure(context());
  history_.add(job.signature);
  try {
    executor_->run(job);
  } catch (const Interrupted&) {
    throw_failure(context());
  } catch (const Error& error) {
    if (error.kind() == ErrorKind::peer_lost && learns_cause()) throw_failure(context());
    fail(error, true);
    throw;
  } catch (const std::exception& error) {
    fail(Error(ErrorKind::error, context() + ": " + error.what()), true);
    throw;
  }
}

void Communicator::run(const Call& call) {
  check_process();
  queue_->run(call);
}
void Communicator::kick() {
  check_process();
  queue_->kick();
}
std::shared_ptr<Work> Communicator::submit(const Call& call, Work::Finish finish, bool eager) {
  check_process();
  return queue_->submit(call, std::move(finish), eager);
}

std::shared_ptr<Work> Communicator::send(const void* data, size_t nbytes, DType dtype, int peer, double timeout_s,
                                         int tag) {
  return p2p_->post(static_cast<std::byte*>(const_cast<void*>(data)), nbytes, dtype, peer, tag, timeout_s, true, {});
}
std::shared_ptr<Work> Communicator::recv(void* data, size_t nbytes, DType dtype, int peer, double timeout_s, int tag,
                                         Work::Finish finish) {
  return p2p_->post(static_cast<std::byte*>(data), nbytes, dtype, peer, tag, timeout_s, false, std::move(finish));
}

std::string Communicator::dump_plan(const Call& call) {
  check_process();
  const auto lock = queue_->lock();
  return plan(call, *check_program(call), false).dump();
}

uint64_t Communicator::bytes_sent(int peer) const {
  if (peer < 0 || peer >= world_size_ || which_[static_cast<size_t>(peer)] < 0) return 0;
  const auto which = static_cast<size_t>(which_[static_cast<size_t>(peer)]);
  return endpoints_[which]->bytes_sent(peer) + p2p_endpoints_[which]->bytes_sent(peer);
}

std::string Communicator::transport(int peer) const {
  if (peer < 0 || peer >= world_size_) throw Error(ErrorKind::invalid_argument, "no rank " + std::to_string(peer));
  const int which = which_[static_cast<size_t>(peer)];
  return which < 0 ? "self" : endpoints_[static_cast<size_t>(which)]->name();
}

}  // namespace paracomm
