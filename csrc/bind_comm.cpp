// Communicators, their programs and the handles of asynchronous operations.
#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <chrono>

#include "array.h"
#include "comm/communicator.h"
#include "convert.h"
#include "core/nap.h"
#include "core/strided.h"
#include "register.h"

namespace py = pybind11;
using namespace paracomm;

namespace {

using IntArray = py::array_t<int32_t, py::array::c_style | py::array::forcecast>;

Program make_program(const Text& name, int collective, int rank, int world_size, int root, int chunks,
                     int scratch_chunks, int volume, int levels, int pair_depth, uint32_t fingerprint,
                     const IntArray& ops) {
  if (ops.ndim() != 2 || ops.shape(1) != 12)
    throw Error(ErrorKind::invalid_argument, "ops of a program have shape [n, 12]");
  Program program;
  program.name = name.bytes;
  program.collective = convert::collective(collective);
  program.rank = rank;
  program.world_size = world_size;
  program.root = root;
  program.chunks = chunks;
  program.scratch_chunks = scratch_chunks;
  program.volume = volume;
  program.levels = levels;
  program.pair_depth = pair_depth;
  program.fingerprint = fingerprint;
  const auto table = ops.unchecked<2>();
  for (py::ssize_t i = 0; i < ops.shape(0); ++i) {
    Op op;
    op.kind = static_cast<OpKind>(table(i, 0));
    op.src = {static_cast<BufferId>(table(i, 1)), table(i, 2), table(i, 3)};
    op.dst = {static_cast<BufferId>(table(i, 4)), table(i, 5), table(i, 6)};
    op.peer = table(i, 7);
    op.level = table(i, 8);
    op.final = table(i, 9) != 0;
    op.early_write = table(i, 10) != 0;
    op.size_chunk = table(i, 11);
    program.ops.push_back(op);
  }
  return program;
}

Call make_call(int program, uintptr_t input, uintptr_t output, size_t count, int dtype, int op, double timeout_s,
               std::vector<size_t> blocks, std::vector<size_t> output_blocks, size_t largest_block) {
  Call call;
  call.program = program;
  call.input = reinterpret_cast<const void*>(input);
  call.output = reinterpret_cast<void*>(output);
  call.count = count;
  call.dtype = convert::dtype(dtype);
  call.op = convert::reduce_op(op);
  call.timeout_s = timeout_s;
  call.blocks = std::move(blocks);
  call.output_blocks = std::move(output_blocks);
  call.largest_block = largest_block;
  return call;
}

/// Ctrl-C ends a wait: the signal's handler runs and what it raises is thrown.
void look_for_signals() {
  const py::gil_scoped_acquire gil;
  if (PyErr_CheckSignals() != 0) throw py::error_already_set();
}

/// Released while the core works, and signals are looked for meanwhile.
struct WithoutGil {
  WithoutGil() { nap_hook = &look_for_signals; }
  py::gil_scoped_release release;
};

/// What is copied out of a packed array when an operation is complete: the strided arrays' parts.
class Unpack {
 public:
  using Part = std::tuple<size_t, py::object, size_t, size_t>;

  Unpack(uintptr_t packed, const std::vector<Part>& parts) {
    for (const auto& [offset, array, begin, count] : parts) {
      const ArrayView view = view_of(array.ptr());
      if (!view.writable || view.device != ArrayView::kHost || begin > view.count || count > view.count - begin)
        throw Error(ErrorKind::invalid_argument, "elements " + std::to_string(begin) + " to " +
                                                     std::to_string(begin + count) + " of an array of " +
                                                     std::to_string(view.count) + " cannot be written");
      Strided to{static_cast<std::byte*>(view.data), size_of(view.dtype), view.shape, view.strides};
      if (view.contiguous) {
        to.shape = {static_cast<int64_t>(view.count)};
        to.strides = {static_cast<int64_t>(to.item)};
      }
      copies_.push_back({reinterpret_cast<const std::byte*>(packed) + offset, std::move(to), begin, count});
    }
  }
  void operator()() const {
    for (const Copy& copy : copies_) unpack(copy.from, copy.to, copy.begin, copy.count);
  }

 private:
  struct Copy {
    const std::byte* from;
    Strided to;
    size_t begin, count;
  };
  std::vector<Copy> copies_;
};

void need_memory(uintptr_t data, size_t nbytes) {
  if (data == 0 && nbytes > 0)
    throw Error(ErrorKind::invalid_argument, "no memory for a message of " + std::to_string(nbytes) + " bytes");
}

/// None, an Unpack (which needs no lock of Python's), or whatever can be called.
Work::Finish make_finish(const py::object& finish) {
  if (finish.is_none()) return {};
  if (py::isinstance<Unpack>(finish)) return finish.cast<Unpack>();
  const std::shared_ptr<PyObject> call(finish.inc_ref().ptr(), [](PyObject* p) {
    const py::gil_scoped_acquire gil;
    Py_DECREF(p);
  });
  return [call] {
    const py::gil_scoped_acquire gil;
    try {
      py::handle(call.get())();
    } catch (const py::error_already_set& error) {
      throw Error(ErrorKind::error, std::string("the result could not be put into its array: ") + error.what());
    }
  };
}

/// What the C function below works on; lives as long as the function object.
struct FastState {
  std::shared_ptr<Communicator> comm;
};

/// The code of a reduction's name, -1 if there is none.
int op_code(PyObject* name) {
  static PyObject* const names[kReduceOps] = {PyUnicode_InternFromString("sum"), PyUnicode_InternFromString("prod"),
                                              PyUnicode_InternFromString("min"), PyUnicode_InternFromString("max"),
                                              PyUnicode_InternFromString("avg"), PyUnicode_InternFromString("band"),
                                              PyUnicode_InternFromString("bor"), PyUnicode_InternFromString("bxor")};
  for (int i = 0; i < kReduceOps; ++i)
    if (name == names[i]) return i;
  for (int i = 0; i < kReduceOps; ++i)
    if (PyUnicode_Check(name) && PyUnicode_Compare(name, names[i]) == 0) return i;
  return -1;
}

bool is_plain(const ArrayView& view) { return view.contiguous && !view.lazy && view.device == ArrayView::kHost; }

/// Not so what may be resized by others while nobody exports its buffer: a bytearray.
bool holds_its_memory(PyObject* array) {
  const PyBufferProcs* const buffer = Py_TYPE(array)->tp_as_buffer;
  return buffer == nullptr || buffer->bf_getbuffer == nullptr || buffer->bf_releasebuffer == nullptr;
}

bool overlap(const ArrayView& a, const ArrayView& b) {
  const auto *begin = static_cast<const std::byte*>(a.data), *other = static_cast<const std::byte*>(b.data);
  return begin < other + b.count * size_of(b.dtype) && other < begin + a.count * size_of(a.dtype);
}

/// all_reduce(x, op, out or None) -> True, or None where the Python layer must take over: memory that is not
/// contiguous, other dtypes or counts, no schedule chosen yet, memory of a GPU. The wrapper around a call of 0.3 us
/// must be short.
PyObject* fast_all_reduce(PyObject* self, PyObject* const* args, Py_ssize_t n_args) {
  try {
    auto* state = static_cast<FastState*>(PyCapsule_GetPointer(self, nullptr));
    if (state == nullptr || n_args != 3) throw Error(ErrorKind::invalid_argument, "expected (x, op, out)");
    const int op = op_code(args[1]);
    const bool in_place = args[2] == Py_None;
    ArrayView in, other;
    try {
      in = view_of(args[0]);
      if (!in_place) other = view_of(args[2]);
    } catch (const Error&) {
      Py_RETURN_NONE;  // the Python layer knows more kinds of arrays, and says what is wrong with the others
    }
    const ArrayView& out = in_place ? in : other;
    Call call;
    call.dtype = in.dtype;
    call.count = in.count;
    call.program = state->comm->choose(Collective::all_reduce, -1, in.count * size_of(in.dtype));
    if (op < 0 || !is_plain(in) || !is_plain(out) || !out.writable || out.dtype != in.dtype || out.count != in.count ||
        call.program < 0 || !holds_its_memory(args[0]) || (!in_place && !holds_its_memory(args[2])) ||
        (in.data != out.data && overlap(in, out)))
      Py_RETURN_NONE;
    call.input = in.data;
    call.output = out.data;
    call.op = static_cast<ReduceOp>(op);
    {
      const WithoutGil released;
      state->comm->run(call);
    }
    Py_RETURN_TRUE;
  } catch (py::error_already_set& error) {
    error.restore();
  } catch (const Error&) {
    py::detail::try_translate_exceptions();
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
  }
  return nullptr;
}

PyMethodDef fast_all_reduce_def = {"all_reduce_in_place",
                                   reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(&fast_all_reduce)),
                                   METH_FASTCALL, "all_reduce(x, op, out)"};

py::object make_fast_all_reduce(std::shared_ptr<Communicator> comm) {
  auto* state = new FastState{std::move(comm)};
  const py::capsule capsule(state, [](void* p) { delete static_cast<FastState*>(p); });
  return py::reinterpret_steal<py::object>(PyCFunction_NewEx(&fast_all_reduce_def, capsule.ptr(), nullptr));
}

/// False where no schedule is chosen yet.
bool barrier(Communicator& comm, double timeout_s) {
  Call call;
  call.dtype = DType::uint8;
  call.program = comm.choose(Collective::barrier, -1, 0);
  call.timeout_s = timeout_s;
  if (call.program < 0) return false;
  comm.run(call);
  return true;
}

/// Seconds of each of `iterations` in-place float32 sums, timed here, without Python; a barrier program before each.
std::vector<double> time_all_reduce(Communicator& comm, int program, int barrier, size_t count, int iterations,
                                    bool arena) {
  constexpr size_t kMostElements = size_t{1} << 30;
  if (count > kMostElements || iterations < 0 || iterations > 1'000'000)
    throw Error(ErrorKind::invalid_argument, "to time " + std::to_string(iterations) + " sums of " +
                                                 std::to_string(count) + " elements, expected 0 to 1000000 of up to " +
                                                 std::to_string(kMostElements));
  const size_t nbytes = std::max<size_t>(count * sizeof(float), 64);
  std::vector<std::unique_ptr<float[]>> own;
  std::vector<void*> buffers;
  for (int i = 0; i < 2; ++i) {
    if (!arena) own.push_back(std::make_unique<float[]>(nbytes / sizeof(float)));
    buffers.push_back(arena ? Arena::process().allocate(nbytes) : own.back().get());
  }
  std::vector<double> seconds;
  Call call, meet;
  call.program = program;
  call.count = count;
  call.dtype = DType::float32;
  meet.program = barrier;
  for (int i = 0; i < iterations; ++i) {
    auto* x = static_cast<float*>(buffers[static_cast<size_t>(i % 2)]);
    std::fill(x, x + count, 1.0f);
    call.input = call.output = x;
    if (barrier >= 0) comm.run(meet);
    const auto start = std::chrono::steady_clock::now();
    comm.run(call);
    seconds.push_back(std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
    if (count > 0 && (x[0] != static_cast<float>(comm.world_size()) || x[count - 1] != x[0]))
      throw Error(ErrorKind::error, "all_reduce gave a wrong sum while it was timed");
  }
  if (arena)
    for (void* p : buffers) Arena::process().release(p);
  return seconds;
}

}  // namespace

void register_comm(py::module_& m) {
  const auto nogil = py::call_guard<WithoutGil>();

  m.def(
      "view",
      [](py::handle object) -> py::tuple {
        const ArrayView v = view_of(object.ptr());
        const auto address = reinterpret_cast<uintptr_t>(v.data);
        const int dtype = static_cast<int>(v.dtype);
        if (v.contiguous && !v.lazy && v.device == ArrayView::kHost)
          return py::make_tuple(address, v.count, dtype, v.contiguous, v.writable);
        const py::object stream = v.stream == ArrayView::kAnyStream ? py::object(py::none()) : py::int_(v.stream);
        return py::make_tuple(address, v.count, dtype, v.contiguous && !v.lazy, v.writable, v.device, stream, v.lazy,
                              is_distinct(v));
      },
      py::arg("array"),
      "(address, count, dtype, contiguous, writable) of an array; where it is strided, lazily negated or on a GPU also "
      "(device, stream or None, lazy, distinct): whether torch shows the negative of its memory, and whether no two "
      "elements share memory.");

  py::class_<Unpack>(m, "Unpack", py::is_final(), convert::constructed_at_once())
      .def(py::init<uintptr_t, const std::vector<Unpack::Part>&>(), py::arg("packed"), py::arg("parts"),
           "Parts: (offset in bytes, array, first element, number of elements). Calling it copies them.")
      .def("__call__", [](const Unpack& u) { u(); }, py::call_guard<py::gil_scoped_release>());

  py::class_<Program>(m, "Program", py::is_final(), convert::constructed_at_once())
      .def(py::init(&make_program), py::kw_only(), py::arg("name"), py::arg("collective"), py::arg("rank"),
           py::arg("world_size"), py::arg("root"), py::arg("chunks"), py::arg("scratch_chunks"), py::arg("volume"),
           py::arg("levels"), py::arg("pair_depth"), py::arg("fingerprint"), py::arg("ops"));

  py::class_<Listener>(m, "Listener", py::is_final(), convert::constructed_at_once())
      .def(py::init([](const Text& interface, const Text& master_address, const Text& host_id) {
             ListenerOptions options;
             options.interface = interface.bytes;
             options.master_address = master_address.bytes;
             options.host_id = host_id.bytes;
             return std::make_unique<Listener>(std::move(options));
           }),
           py::kw_only(), py::arg("interface") = "", py::arg("master_address") = "", py::arg("host_id") = "")
      .def("publish", [](const Listener& listener) { return py::bytes(listener.publish()); })
      .def_property_readonly("ip", [](const Listener& listener) { return to_str(listener.address().ip); })
      .def_property_readonly("host_id", [](const Listener& listener) { return to_str(listener.address().host_id); });

  py::class_<Work, std::shared_ptr<Work>>(m, "Work", py::is_final(), convert::made_by_the_core())
      .def("wait", convert::method(&Work::wait), py::arg("timeout_s") = -1.0, nogil)
      .def("done", convert::method(&Work::done))
      .def_property_readonly("source", convert::method(&Work::source))
      .def_property_readonly("began_ns", convert::method(&Work::began_ns))
      .def_property_readonly("ended_ns", convert::method(&Work::ended_ns));
  m.attr("ANY_PEER") = kAnyPeer;

  py::dict ranges;
  for (const OptionRange& range : kOptionRanges) ranges[range.name] = py::make_tuple(range.least, range.most);
  m.attr("OPTIONS") = ranges;
  m.attr("MOST_THREADS") = kMostThreads;
  auto options = [](double timeout_s, size_t window_bytes, size_t staging_bytes, int sockets_per_peer, int cores,
                    int lag) {
    CommOptions o;
    o.lag = lag;
    o.timeout_s = timeout_s;
    o.window_bytes = window_bytes;
    o.staging_bytes = staging_bytes;
    o.sockets_per_peer = sockets_per_peer;
    o.cores = cores;
    check_options(o);
    return o;
  };
  m.def(
      "connect",
      [options](int rank, Listener& listener, const std::vector<std::string>& blobs, double connect_timeout_s,
                double timeout_s, size_t window_bytes, size_t staging_bytes, int sockets_per_peer, int cores, int lag) {
        if (!(connect_timeout_s > 0))
          throw Error(ErrorKind::invalid_argument, "connect_timeout_s is " + std::to_string(connect_timeout_s) +
                                                       ", expected a number of seconds above 0");
        py::gil_scoped_release release;
        return Communicator::connect(rank, listener, blobs,
                                     options(timeout_s, window_bytes, staging_bytes, sockets_per_peer, cores, lag),
                                     Deadline::after(connect_timeout_s));
      },
      py::arg("rank"), py::arg("listener"), py::arg("blobs"), py::kw_only(), py::arg("connect_timeout_s"),
      py::arg("timeout_s"), py::arg("window_bytes") = 0, py::arg("staging_bytes") = 0, py::arg("sockets_per_peer") = 0,
      py::arg("cores") = 0, py::arg("lag") = 0);
  m.def(
      "local_communicators",
      [options](int world_size, double timeout_s, size_t window_bytes) {
        return Communicator::local(world_size, options(timeout_s, window_bytes, 0, 0, 0, 0));
      },
      py::arg("world_size"), py::kw_only(), py::arg("timeout_s"), py::arg("window_bytes") = 0);

  auto call_args = [](auto& cls, const char* name, auto function, auto... extra) {
    cls.def(name, function, py::arg("program"), py::arg("input"), py::arg("output"), py::arg("count"), py::arg("dtype"),
            py::arg("op"), py::arg("timeout_s") = -1.0, py::arg("blocks") = std::vector<size_t>{},
            py::arg("output_blocks") = std::vector<size_t>{}, py::arg("largest_block") = 0, extra...);
  };
  const auto finish_arg = py::arg("finish") = py::none();
  py::class_<Communicator, std::shared_ptr<Communicator>> cls(m, "Communicator", py::is_final(),
                                                              convert::made_by_the_core());
  cls.def_property_readonly("rank", convert::method(&Communicator::rank))
      .def_property_readonly("world_size", convert::method(&Communicator::world_size))
      .def_property_readonly("hosts",
                             [](const Communicator& c) {
                               py::list hosts;
                               for (const std::string& host : c.hosts()) hosts.append(to_str(host));
                               return hosts;
                             })
      .def_property_readonly("host_indices", convert::method(&Communicator::host_indices))
      .def_property_readonly("local_ranks", convert::method(&Communicator::local_ranks))
      .def_property_readonly("cores", [](const Communicator& c) { return c.options().cores; })
      .def_property_readonly("timeout_s", [](const Communicator& c) { return c.options().timeout_s; })
      .def("add_program", convert::method(&Communicator::add_program), py::arg("program"))
      .def(
          "set_choice",
          [](Communicator& c, int collective, int root, std::vector<std::pair<size_t, int>> entries) {
            c.set_choice(convert::collective(collective), root, std::move(entries));
          },
          py::arg("collective"), py::arg("root"), py::arg("entries"))
      .def(
          "choose",
          [](const Communicator& c, int collective, int root, size_t nbytes) {
            return c.choose(convert::collective(collective), root, nbytes);
          },
          py::arg("collective"), py::arg("root"), py::arg("nbytes"))
      .def(
          "send",
          [](Communicator& c, uintptr_t data, size_t nbytes, int dtype, int peer, double timeout_s, int tag) {
            // No lock of the core's is waited for with Python's held: who holds it may need Python's, see make_finish.
            const py::gil_scoped_release released;
            need_memory(data, nbytes);
            return c.send(reinterpret_cast<void*>(data), nbytes, convert::dtype(dtype), peer, timeout_s, tag);
          },
          py::arg("data"), py::arg("nbytes"), py::arg("dtype"), py::arg("peer"), py::arg("timeout_s") = -1.0,
          py::arg("tag") = 0)
      .def(
          "recv",
          [](Communicator& c, uintptr_t data, size_t nbytes, int dtype, int peer, double timeout_s, int tag,
             const py::object& finish) {
            Work::Finish after = make_finish(finish);
            const py::gil_scoped_release released;
            need_memory(data, nbytes);
            return c.recv(reinterpret_cast<void*>(data), nbytes, convert::dtype(dtype), peer, timeout_s, tag,
                          std::move(after));
          },
          py::arg("data"), py::arg("nbytes"), py::arg("dtype"), py::arg("peer"), py::arg("timeout_s") = -1.0,
          py::arg("tag") = 0, py::arg("finish") = py::none())
      .def(
          "abort", [](Communicator& c, const Text& why) { c.abort(why.bytes); }, py::arg("why"), nogil)
      .def("close", convert::method(&Communicator::close), nogil)
      .def("check", convert::method(&Communicator::check))
      .def("bytes_sent", convert::method(&Communicator::bytes_sent), py::arg("peer"))
      .def("transport", convert::method(&Communicator::transport), py::arg("peer"))
      .def("seconds_waiting", convert::method(&Communicator::seconds_waiting))
      .def("fast_all_reduce", &make_fast_all_reduce)
      .def("barrier", &barrier, py::arg("timeout_s"), nogil)
      .def("time_all_reduce", &time_all_reduce, py::arg("program"), py::arg("barrier"), py::arg("count"),
           py::arg("iterations"), py::arg("arena"), nogil);
  call_args(
      cls, "run",
      [](Communicator& c, int program, uintptr_t in, uintptr_t out, size_t count, int dtype, int op, double timeout_s,
         std::vector<size_t> blocks, std::vector<size_t> output_blocks, size_t largest) {
        c.run(make_call(program, in, out, count, dtype, op, timeout_s, std::move(blocks), std::move(output_blocks),
                        largest));
      },
      nogil);
  call_args(
      cls, "submit",
      [](Communicator& c, int program, uintptr_t in, uintptr_t out, size_t count, int dtype, int op, double timeout_s,
         std::vector<size_t> blocks, std::vector<size_t> output_blocks, size_t largest, const py::object& finish,
         bool eager) {
        Work::Finish after = make_finish(finish);
        const py::gil_scoped_release released;
        return c.submit(make_call(program, in, out, count, dtype, op, timeout_s, std::move(blocks),
                                  std::move(output_blocks), largest),
                        std::move(after), eager);
      },
      finish_arg, py::arg("eager") = true);
  cls.def("kick", convert::method(&Communicator::kick), nogil);
  cls.def("attach_device", convert::method(&Communicator::attach_device), py::arg("device"));
  cls.def(
      "submit_device",
      [](Communicator& c, uintptr_t stream, int program, uintptr_t in, uintptr_t out, size_t count, int dtype, int op,
         double timeout_s, std::vector<size_t> blocks, std::vector<size_t> output_blocks, size_t largest,
         const py::object& finish) {
        Work::Finish after = make_finish(finish);
        const py::gil_scoped_release released;
        return c.submit_device(make_call(program, in, out, count, dtype, op, timeout_s, std::move(blocks),
                                         std::move(output_blocks), largest),
                               stream, std::move(after));
      },
      py::arg("stream"), py::arg("program"), py::arg("input"), py::arg("output"), py::arg("count"), py::arg("dtype"),
      py::arg("op"), py::arg("timeout_s"), py::arg("blocks"), py::arg("output_blocks"), py::arg("largest_block"),
      finish_arg);
  call_args(cls, "dump_plan",
            [](Communicator& c, int program, uintptr_t in, uintptr_t out, size_t count, int dtype, int op,
               double timeout_s, std::vector<size_t> blocks, std::vector<size_t> output_blocks, size_t largest) {
              return to_str(c.dump_plan(make_call(program, in, out, count, dtype, op, timeout_s, std::move(blocks),
                                                  std::move(output_blocks), largest)));
            });

  py::class_<Arena, std::unique_ptr<Arena, py::nodelete>>(m, "Arena", py::is_final(), convert::made_by_the_core())
      .def_static("process", &Arena::process, py::return_value_policy::reference)
      .def(
          "allocate",
          [](Arena& arena, size_t nbytes) {
            void* const p = arena.allocate(nbytes);
            // A writable buffer that gives its pages back with its last reference; NumPy and torch hold on to it.
            using Pages = std::pair<Arena*, void*>;
            const py::capsule owner(new Pages(&arena, p), [](void* q) {
              const std::unique_ptr<Pages> pages(static_cast<Pages*>(q));
              pages->first->release(pages->second);
            });
            return py::array_t<uint8_t>({static_cast<py::ssize_t>(nbytes)}, {1}, static_cast<uint8_t*>(p), owner);
          },
          py::arg("nbytes"), "uint8 array [nbytes], zeroed")
      .def(
          "contains",
          [](const Arena& arena, uintptr_t p, size_t nbytes) {
            return arena.contains(reinterpret_cast<const void*>(p), nbytes);
          },
          py::arg("address"), py::arg("nbytes"))
      .def_property_readonly("bytes_in_use", convert::method(&Arena::bytes_in_use))
      .def_property_readonly("size", [](const Arena& arena) { return arena.mapping().size(); });

  for (const char* name : {"Program", "Listener", "Work", "Communicator", "Arena"}) convert::seal(m.attr(name));
}
