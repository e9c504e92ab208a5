// Streams, graphs, buckets, and ranks that are processes.
#include <signal.h>

#include <chrono>
#include <thread>

#include "devices.h"

using namespace paracomm;
using namespace paracomm_test;

namespace {

/// A rank's float32 buffer, and the sum of all ranks' that must come out.
struct Summand {
  Bytes bytes;
  explicit Summand(size_t count, int rank, int round) : bytes(count * sizeof(float)) {
    for (size_t i = 0; i < count; ++i) {
      const float value = static_cast<float>((i % 97) + 1) * static_cast<float>(rank + 1) + static_cast<float>(round);
      std::memcpy(&bytes[i * sizeof value], &value, sizeof value);
    }
  }
  /// Small whole numbers, exact in any order.
  static Bytes sum(size_t count, int ranks, int round) {
    Bytes bytes(count * sizeof(float));
    for (size_t i = 0; i < count; ++i) {
      float value = 0;
      for (int r = 0; r < ranks; ++r)
        value += static_cast<float>((i % 97) + 1) * static_cast<float>(r + 1) + static_cast<float>(round);
      std::memcpy(&bytes[i * sizeof value], &value, sizeof value);
    }
    return bytes;
  }
};

Call float_call(int program, const DeviceBuffer& buffer, size_t count) {
  Call call;
  call.program = program;
  call.dtype = DType::float32;
  call.count = count;
  call.input = call.output = buffer.data();
  call.timeout_s = 20;
  return call;
}

int add(DeviceWorld& devices, int rank, const World& world) {
  return devices[rank].add_program(world.programs[static_cast<size_t>(rank)]);
}

/// Many operations on their way at once, each after the one before, and nobody waits on the host until the end.
void test_many_under_way(const std::vector<World>& worlds) {
  constexpr int kRanks = 4, kRounds = 40;
  constexpr size_t kCount = 3001;
  DeviceWorld devices(kRanks);
  run_threads(kRanks, [&](int rank) {
    const DeviceStream stream(rank);
    std::vector<int> programs;
    for (const char* name : {"all_reduce.ring", "all_reduce.one_shot", "all_reduce.ordered", "all_reduce.double_tree"})
      programs.push_back(add(devices, rank, find_world(worlds, name, kRanks)));
    std::vector<std::unique_ptr<DeviceBuffer>> buffers;
    std::vector<std::shared_ptr<Work>> works;
    for (int round = 0; round < kRounds; ++round) {
      buffers.push_back(std::make_unique<DeviceBuffer>(Summand(kCount, rank, round).bytes));
      const int program = programs[static_cast<size_t>(round) % programs.size()];
      works.push_back(devices[rank].submit_device(float_call(program, *buffers.back(), kCount), stream.number()));
    }
    for (int round = 0; round < kRounds; ++round) {
      works[static_cast<size_t>(round)]->wait();
      CHECK(buffers[static_cast<size_t>(round)]->bytes() == Summand::sum(kCount, kRanks, round));
    }
  });
}

/// Calls in one kernel of sizes in turn: a block has other elements in each, and a fast rank must not write what a slow
/// one still reads of the call before.
void test_sizes_in_turn(const std::vector<World>& worlds) {
  constexpr int kRanks = 4, kRounds = 60;
  for (const char* name : {"all_reduce.one_shot", "all_reduce.ordered"}) {
    DeviceWorld devices(kRanks);
    run_threads(kRanks, [&](int rank) {
      const DeviceStream stream(rank);
      const int program = add(devices, rank, find_world(worlds, name, kRanks));
      std::vector<std::unique_ptr<DeviceBuffer>> buffers;
      std::vector<std::shared_ptr<Work>> works;
      const auto count = [](int round) { return std::vector<size_t>{400, 9001, 2500}[static_cast<size_t>(round) % 3]; };
      for (int round = 0; round < kRounds; ++round)
        buffers.push_back(std::make_unique<DeviceBuffer>(Summand(count(round), rank, round).bytes));
      for (int round = 0; round < kRounds; ++round) {
        const DeviceBuffer& buffer = *buffers[static_cast<size_t>(round)];
        works.push_back(devices[rank].submit_device(float_call(program, buffer, count(round)), stream.number()));
      }
      for (int round = 0; round < kRounds; ++round) {
        works[static_cast<size_t>(round)]->wait();
        CHECK(buffers[static_cast<size_t>(round)]->bytes() == Summand::sum(count(round), kRanks, round));
      }
    });
  }
}

/// A root may be many broadcasts ahead of the others; a rank's ring holds it back before it writes over what is unread.
void test_sender_runs_ahead(const std::vector<World>& worlds) {
  constexpr size_t kCount = 6007;
  const World& world = find_world(worlds, "broadcast.chain", 3);
  DeviceWorld devices(3);
  run_threads(3, [&](int rank) {
    const DeviceStream stream(rank);
    const int program = add(devices, rank, world);
    for (int round = 0; round < 30; ++round) {
      if (rank == (round % 3)) std::this_thread::sleep_for(std::chrono::milliseconds(2));
      const DeviceBuffer buffer(Summand(kCount, rank == 1 ? 0 : 5, round).bytes);
      devices[rank].submit_device(float_call(program, buffer, kCount), stream.number())->wait();
      CHECK(buffer.bytes() == Summand(kCount, 0, round).bytes);
    }
  });
}

/// Other streams go on after an operation without the host's doing.
void test_join(const std::vector<World>& worlds) {
  constexpr size_t kCount = 3001;
  DeviceWorld devices(2);
  run_threads(2, [&](int rank) {
    const DeviceStream stream(rank), other(rank);
    const int program = add(devices, rank, find_world(worlds, "all_reduce.ring", 2));
    const Bytes mine = Summand(kCount, rank, 0).bytes;
    const DeviceBuffer buffer(Bytes(mine.size())), copy(Bytes(mine.size()));
    check_cuda(cudaMemcpyAsync(buffer.data(), mine.data(), mine.size(), cudaMemcpyHostToDevice, stream));
    const auto work = devices[rank].submit_device(float_call(program, buffer, kCount), stream.number());
    devices[rank].device()->join(*work, other.number());
    check_cuda(cudaMemcpyAsync(copy.data(), buffer.data(), mine.size(), cudaMemcpyDeviceToDevice, other));
    check_cuda(cudaStreamSynchronize(other));
    CHECK(copy.bytes() == Summand::sum(kCount, 2, 0));
    work->wait();
    CHECK(work->ended_ns() >= work->began_ns());
    std::vector<int32_t> host(8);
    Call call;
    call.program = program;
    call.count = host.size();
    call.dtype = DType::int32;
    call.input = call.output = host.data();
    const auto on_host = devices[rank].submit(call);
    on_host->wait();
    CHECK_THROWS(devices[rank].device()->join(*on_host, other.number()), ErrorKind::invalid_argument, "did not run");
  });
}

/// Collectives that are captured once run again and again, on new data.
void test_graph(const std::vector<World>& worlds) {
  constexpr int kRanks = 3;
  constexpr size_t kCount = 5003;
  DeviceWorld devices(kRanks);
  run_threads(kRanks, [&](int rank) {
    const DeviceStream stream(rank);
    const int ring = add(devices, rank, find_world(worlds, "all_reduce.ring", kRanks));
    const int two_shot = add(devices, rank, find_world(worlds, "all_reduce.ordered", kRanks));
    const DeviceBuffer a(Summand(kCount, rank, 0).bytes), b(a.bytes());
    cudaGraph_t graph = nullptr;
    cudaGraphExec_t exec = nullptr;
    check_cuda(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
    for (const auto& [program, buffer] : {std::pair(ring, &a), std::pair(two_shot, &b)}) {
      const auto work = devices[rank].submit_device(float_call(program, *buffer, kCount), stream.number());
      CHECK(work->done());
      devices[rank].device()->join(*work, stream.number());
    }
    check_cuda(cudaStreamEndCapture(stream, &graph));
    check_cuda(cudaGraphInstantiate(&exec, graph));
    for (int round = 1; round < 6; ++round) {
      const Bytes mine = Summand(kCount, rank, round).bytes;
      for (const DeviceBuffer* buffer : {&a, &b})
        check_cuda(cudaMemcpyAsync(buffer->data(), mine.data(), mine.size(), cudaMemcpyHostToDevice, stream));
      check_cuda(cudaGraphLaunch(exec, stream));
      // Others in between go on counting where the graph's kernels stopped.
      const DeviceBuffer c(mine);
      devices[rank].submit_device(float_call(ring, c, kCount), stream.number())->wait();
      check_cuda(cudaStreamSynchronize(stream));
      for (const DeviceBuffer* buffer : {&a, &b, &c}) CHECK(buffer->bytes() == Summand::sum(kCount, kRanks, round));
    }
    check_cuda(cudaGraphExecDestroy(exec));
    check_cuda(cudaGraphDestroy(graph));
  });
}

/// A graph that waits for a peer in vain ends, and the communicator fails with a name, without anybody in wait().
void test_graph_times_out(const std::vector<World>& worlds) {
  DeviceWorld devices(2);
  const DeviceStream stream(0);
  const int program = add(devices, 0, find_world(worlds, "all_reduce.ring", 2));
  const DeviceBuffer buffer(Summand(100, 0, 0).bytes);
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t exec = nullptr;
  check_cuda(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  Call call = float_call(program, buffer, 100);
  call.timeout_s = 0.2;
  const auto work = devices[0].submit_device(call, stream.number());
  devices[0].device()->join(*work, stream.number());
  check_cuda(cudaStreamEndCapture(stream, &graph));
  check_cuda(cudaGraphInstantiate(&exec, graph));
  check_cuda(cudaGraphLaunch(exec, stream));
  check_cuda(cudaStreamSynchronize(stream));
  std::this_thread::sleep_for(std::chrono::milliseconds(100));
  CHECK_THROWS(devices[0].check(), ErrorKind::timeout, "all_reduce[ring] #1 rank 0 (thread) at op ");
  CHECK_THROWS(devices[1].check(), ErrorKind::timeout, "recv from rank 1");
  check_cuda(cudaGraphExecDestroy(exec));
  check_cuda(cudaGraphDestroy(graph));
}

// --- buckets ---

double number(DType dtype, const std::byte* at) {
  switch (dtype) {
    case DType::float64: {
      double value;
      std::memcpy(&value, at, sizeof value);
      return value;
    }
    case DType::float32: {
      float value;
      std::memcpy(&value, at, sizeof value);
      return static_cast<double>(value);
    }
    case DType::float16: {
      _Float16 value;
      std::memcpy(&value, at, sizeof value);
      return static_cast<double>(value);
    }
    default: {
      uint16_t half;
      std::memcpy(&half, at, sizeof half);
      const uint32_t bits = static_cast<uint32_t>(half) << 16;
      float value;
      std::memcpy(&value, &bits, sizeof value);
      return static_cast<double>(value);
    }
  }
}

void put_number(DType dtype, double value, std::byte* at) {
  const auto narrow = static_cast<float>(value);
  uint32_t bits;
  std::memcpy(&bits, &narrow, sizeof bits);
  const auto half = static_cast<_Float16>(narrow);
  const auto brain = static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
  switch (dtype) {
    case DType::float64:
      return static_cast<void>(std::memcpy(at, &value, sizeof value));
    case DType::float32:
      return static_cast<void>(std::memcpy(at, &narrow, sizeof narrow));
    case DType::float16:
      return static_cast<void>(std::memcpy(at, &half, sizeof half));
    default:
      std::memcpy(at, &brain, sizeof brain);
  }
}

/// As the kernel promises: through float32, but between two float64, and rounded once.
Bytes converted(const Bytes& from, DType from_dtype, DType to_dtype, double scale) {
  const size_t count = from.size() / size_of(from_dtype);
  Bytes to(count * size_of(to_dtype));
  for (size_t i = 0; i < count; ++i) {
    const double value = number(from_dtype, &from[i * size_of(from_dtype)]);
    const bool wide = from_dtype == DType::float64 && to_dtype == DType::float64;
    const double scaled =
        wide ? value * scale : static_cast<double>(static_cast<float>(value) * static_cast<float>(scale));
    put_number(to_dtype, scaled, &to[i * size_of(to_dtype)]);
  }
  return to;
}

/// Tensors of odd lengths, one of them empty, one of several pieces, one at an odd address.
void test_bucket(DeviceExecutor& device, DType dtype, DType flat_dtype, double scale, const DeviceStream& stream) {
  const std::vector<size_t> counts{1, 1000, 0, 20'011, 77};
  std::vector<std::unique_ptr<DeviceBuffer>> tensors;
  std::vector<BucketItem> items;
  Bytes all;
  size_t offset = 0;
  for (size_t t = 0; t < counts.size(); ++t) {
    Bytes bytes = random_elements(dtype, counts[t], t + 1);
    if (is_floating(dtype))
      for (size_t i = 0; i < counts[t]; ++i)
        put_number(dtype, static_cast<double>(i % 1999) / 7 - 100, &bytes[i * size_of(dtype)]);
    tensors.push_back(std::make_unique<DeviceBuffer>(bytes, t == 1 ? size_of(dtype) : 0));
    items.push_back({tensors.back()->data(), counts[t], offset});
    offset += counts[t];
    all.insert(all.end(), bytes.begin(), bytes.end());
  }
  const auto bucket = device.bucket(items, dtype);
  const DeviceBuffer flat(Bytes(offset * size_of(flat_dtype)));
  device.pack(*bucket, flat.data(), flat_dtype, scale, stream.number());
  check_cuda(cudaStreamSynchronize(stream));
  const bool exact = dtype == flat_dtype && scale == 1;
  const Bytes packed = exact ? all : converted(all, dtype, flat_dtype, scale);
  CHECK(flat.bytes() == packed);
  device.unpack(*bucket, flat.data(), flat_dtype, 1 / scale, stream.number());
  check_cuda(cudaStreamSynchronize(stream));
  const Bytes back = exact ? all : converted(packed, flat_dtype, dtype, 1 / scale);
  Bytes found;
  for (const auto& tensor : tensors) {
    const Bytes bytes = tensor->bytes();
    found.insert(found.end(), bytes.begin(), bytes.end());
  }
  CHECK(found == back);
}

void test_buckets() {
  DeviceWorld devices(1);
  DeviceExecutor& device = *devices[0].device();
  const DeviceStream stream(0);
  CHECK_EQ(std::string(device.kind()), "emulated");
  CHECK_EQ(device.device(), 0);
  const DType floating[] = {DType::float64, DType::float32, DType::float16, DType::bfloat16};
  for (const DType dtype : floating)
    for (const DType flat : floating)
      for (const double scale : {1.0, 0.25}) test_bucket(device, dtype, flat, scale, stream);
  for (int d = 0; d < kDTypes; ++d) test_bucket(device, static_cast<DType>(d), static_cast<DType>(d), 1, stream);
  const auto bucket = device.bucket({}, DType::int32);
  device.pack(*bucket, nullptr, DType::int32, 1, stream.number());
  CHECK_THROWS(device.pack(*bucket, nullptr, DType::float32, 1, stream.number()), ErrorKind::invalid_argument,
               "a bucket of int32 in a flat buffer of float32");
}

// --- processes ---

/// A rank's device and communicator in a process of its own; memory goes through IPC handles.
std::shared_ptr<Communicator> connect_device(const Process& process) {
  const auto comm = connect(process, "here");
  const auto device = emulated::make_device_executor(process.rank, small_device(), comm->device_hooks());
  device->connect(process.exchange(device->publish()));
  comm->attach_device(device);
  return comm;
}

void test_processes(const std::vector<World>& worlds) {
  run_processes(3, [&](const Process& process) {
    const auto comm = connect_device(process);
    const DeviceStream stream(process.rank);
    for (const World& world : worlds) {
      if (world.size != process.world_size) continue;
      const int program = comm->add_program(world.programs[static_cast<size_t>(process.rank)]);
      const std::vector<size_t> blocks =
          world.by_block() ? std::vector<size_t>{500, 0, 4001} : std::vector<size_t>{5003};
      if (world.collective() == Collective::barrier) continue;
      const RankData data = make_data(world, process.rank, blocks, DType::bfloat16, ReduceOp::sum, false, 3);
      const Bytes expected = run_on_host(*comm, program, data), got = run_on_device(*comm, program, data, stream);
      CHECK(!data.has_output || same_elements(DType::bfloat16, expected, got));
    }
    process.exchange("");
    comm->close();
  });
}

/// A process that is killed in the middle: the others' kernels end, with its name in the error.
void test_killed(const std::vector<World>& worlds) {
  const World& world = find_world(worlds, "all_reduce.ring", 3);
  run_processes(3,
                [&](const Process& process) {
                  const auto comm = connect_device(process);
                  const DeviceStream stream(process.rank);
                  const int program = comm->add_program(world.programs[static_cast<size_t>(process.rank)]);
                  const DeviceBuffer buffer(Summand(5003, process.rank, 0).bytes);
                  comm->submit_device(float_call(program, buffer, 5003), stream.number())->wait();
                  process.exchange("");
                  if (process.rank == 1) ::kill(::getpid(), SIGKILL);
                  const auto start = std::chrono::steady_clock::now();
                  CHECK_THROWS(comm->submit_device(float_call(program, buffer, 5003), stream.number())->wait(),
                               ErrorKind::peer_lost, "rank 1 (");
                  CHECK(std::chrono::steady_clock::now() - start < std::chrono::seconds(3));
                  comm->close();
                },
                {1});
}

}  // namespace

int main() {
  const std::vector<World> worlds = load_worlds();
  test_processes(worlds);  // before there are threads
  test_killed(worlds);
  test_many_under_way(worlds);
  test_sizes_in_turn(worlds);
  test_sender_runs_ahead(worlds);
  test_join(worlds);
  test_graph(worlds);
  test_graph_times_out(worlds);
  test_buckets();
}
