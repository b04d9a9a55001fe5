// A CUDA device without a GPU, for a CPU build of torch: what device.py loads. See there.
//
// Its memory is host memory that no CPU kernel may be given. A boxed fallback for the CUDA dispatch key checks
// the operands as CUDA kernels do, shows their memory to the CPU kernel as CPU tensors, and makes the results
// tensors of the device: the numbers are the CPU's to the bit.

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/ops/copy_native.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/_fused_sdp_choice.h>
#include <ATen/ops/_scaled_dot_product_attention_math.h>
#include <ATen/ops/_scaled_dot_product_flash_attention_for_cpu.h>
#include <ATen/ops/zeros_like.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <map>
#include <mutex>
#include <set>
#include <unordered_map>

namespace emulated {

using at::Tensor;
using Stack = torch::jit::Stack;
const c10::Device DEVICE(c10::DeviceType::CUDA, 0);

// What Python is told: a wait of the host, with the operation that makes it.
using Report = void (*)(const char* kind, const char* operation);
Report report_wait = nullptr;

void wait(const char* kind, const std::string& operation) {
  if (report_wait) report_wait(kind, operation.c_str());
}

// ---- memory ----

std::mutex memory_lock;
size_t allocated = 0, most_allocated = 0;

void count(ptrdiff_t bytes) {
  std::lock_guard<std::mutex> hold(memory_lock);
  allocated += bytes;
  most_allocated = std::max(most_allocated, allocated);
}

struct Held {  // CPU memory that a storage of the device owns
  c10::Storage storage;
  size_t bytes;
};

void free_held(void* context) {
  auto* held = static_cast<Held*>(context);
  count(-static_cast<ptrdiff_t>(held->bytes));
  delete held;
}

c10::DataPtr own(c10::Storage storage) {
  const size_t bytes = (storage.nbytes() + 511) / 512 * 512;  // as torch's CUDA allocator rounds
  void* data = storage.mutable_data();
  count(bytes);
  return {data, new Held{std::move(storage), bytes}, &free_held, DEVICE};
}

struct DeviceAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    c10::Storage storage(
        c10::Storage::use_byte_size_t(), bytes, c10::GetCPUAllocator()->allocate(bytes), nullptr, false);
    return own(std::move(storage));
  }
  c10::DeleterFnPtr raw_deleter() const override { return nullptr; }
  void copy_data(void* target, const void* source, size_t bytes) const override {
    default_copy_data(target, source, bytes);
  }
} device_allocator;

std::map<uintptr_t, size_t> pinned;  // start of each piece of page-locked memory -> bytes

bool is_pinned(const void* pointer) {
  std::lock_guard<std::mutex> hold(memory_lock);
  const auto address = reinterpret_cast<uintptr_t>(pointer);
  auto after = pinned.upper_bound(address);
  return after != pinned.begin() && address < std::prev(after)->first + std::max<size_t>(std::prev(after)->second, 1);
}

struct Locked {
  c10::DataPtr memory;
};

void free_locked(void* context) {
  auto* locked = static_cast<Locked*>(context);
  {
    std::lock_guard<std::mutex> hold(memory_lock);
    pinned.erase(reinterpret_cast<uintptr_t>(locked->memory.get()));
  }
  delete locked;
}

struct PinnedAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    auto* locked = new Locked{c10::GetCPUAllocator()->allocate(std::max<size_t>(bytes, 1))};
    void* data = locked->memory.get();
    std::lock_guard<std::mutex> hold(memory_lock);
    pinned[reinterpret_cast<uintptr_t>(data)] = bytes;
    return {data, locked, &free_locked, c10::Device(c10::kCPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return nullptr; }
  void copy_data(void* target, const void* source, size_t bytes) const override {
    default_copy_data(target, source, bytes);
  }
} pinned_allocator;

// ---- random numbers ----

struct DeviceGenerator final : c10::GeneratorImpl {
  at::Generator inner = at::detail::createCPUGenerator();
  DeviceGenerator() : c10::GeneratorImpl(DEVICE, c10::DispatchKeySet(c10::DispatchKey::CUDA)) {}
  void set_current_seed(uint64_t seed) override { inner.set_current_seed(seed); }
  void set_offset(uint64_t offset) override { inner.set_offset(offset); }
  uint64_t get_offset() const override { return inner.get_offset(); }
  uint64_t current_seed() const override { return inner.current_seed(); }
  uint64_t seed() override {
    auto inside = inner;
    return inside.seed();
  }
  void set_state(const c10::TensorImpl& state) override { inner.unsafeGetGeneratorImpl()->set_state(state); }
  c10::intrusive_ptr<c10::TensorImpl> get_state() const override {
    return inner.unsafeGetGeneratorImpl()->get_state();
  }
  DeviceGenerator* clone_impl() const override {
    auto* made = new DeviceGenerator();
    made->inner = inner.clone();
    return made;
  }
};

const at::Generator& default_generator() {
  static at::Generator made = at::make_generator<DeviceGenerator>();
  return made;
}

at::Generator inner_of(const at::Generator& generator) {
  TORCH_CHECK(
      generator.device().type() == c10::kCUDA,
      "Expected a 'cuda' device type for generator but found '", generator.device().type(), "'");
  return static_cast<DeviceGenerator*>(generator.unsafeGetGeneratorImpl())->inner;
}

// ---- what torch asks a device for ----

struct Hooks : at::CUDAHooksInterface {
  explicit Hooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasCUDA() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex) const override { return default_generator(); }
  at::Generator getNewGenerator(c10::DeviceIndex) const override {
    return at::make_generator<DeviceGenerator>();
  }
  at::Device getDeviceFromPtr(void*) const override { return DEVICE; }
  bool isPinnedPtr(const void* pointer) const override { return is_pinned(pointer); }
  c10::Allocator* getPinnedMemoryAllocator() const override { return &pinned_allocator; }
  c10::Allocator* getCUDADeviceAllocator() const override { return &device_allocator; }
  c10::DeviceIndex current_device() const override { return 0; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  void setCurrentDevice(c10::DeviceIndex) const override {}
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex) const override { return 0; }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex) const override { return 0; }
  int getNumGPUs() const override { return 1; }
  void deviceSynchronize(c10::DeviceIndex) const override { wait("synchronize", "device"); }
};

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return c10::kCUDA; }
  c10::Device exchangeDevice(c10::Device) const override { return DEVICE; }
  c10::Device getDevice() const override { return DEVICE; }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::Stream getStream(c10::Device) const override { return c10::Stream(c10::Stream::DEFAULT, DEVICE); }
  c10::Stream getDefaultStream(c10::Device) const override { return c10::Stream(c10::Stream::DEFAULT, DEVICE); }
  c10::Stream getNewStream(c10::Device, int) const override {
    static std::atomic<c10::StreamId> last{0};
    return c10::Stream(c10::Stream::UNSAFE, DEVICE, ++last);
  }
  c10::Stream getStreamFromGlobalPool(c10::Device device, bool) const override { return getNewStream(device, 0); }
  c10::Stream exchangeStream(c10::Stream) const override { return c10::Stream(c10::Stream::DEFAULT, DEVICE); }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  void record(void** event, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {
    *event = const_cast<Guard*>(this);
  }
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override { wait("synchronize", "stream"); }
  void synchronizeEvent(void*) const override { wait("synchronize", "event"); }
};

// ---- tensors of the device and the CPU's view of them ----

bool is_here(const Tensor& tensor) { return tensor.defined() && tensor.device().type() == c10::kCUDA; }

Tensor tensor_on(c10::Storage storage, const Tensor& like, const c10::DispatchKeySet* of_view = nullptr) {
  const auto key = like.device().type() == c10::kCPU ? c10::DispatchKey::CUDA : c10::DispatchKey::CPU;
  // a view of a tensor made outside of inference mode is none of inference mode either
  auto made = of_view
      ? at::detail::make_tensor<c10::TensorImpl>(c10::TensorImpl::VIEW, std::move(storage), *of_view, like.dtype())
      : at::detail::make_tensor<c10::TensorImpl>(std::move(storage), c10::DispatchKeySet(key), like.dtype());
  auto* impl = made.unsafeGetTensorImpl();
  impl->set_sizes_and_strides(like.sizes(), like.strides(), like.storage_offset());
  impl->_set_conj(like.is_conj());
  impl->_set_neg(like.is_neg());
  return made;
}

class Shown {  // the tensors of one call, shown to the CPU
 public:
  Tensor show(const Tensor& tensor) {
    if (!is_here(tensor)) return tensor;
    auto* source = tensor.storage().unsafeGetStorageImpl();
    auto known = storages_.find(source);
    if (known == storages_.end()) {
      c10::DataPtr data(
          source->mutable_data(), new c10::Storage(tensor.storage()),
          [](void* held) { delete static_cast<c10::Storage*>(held); }, c10::Device(c10::kCPU));
      c10::Storage view(
          c10::Storage::use_byte_size_t(), source->nbytes(), std::move(data), c10::GetCPUAllocator(), true);
      back_[view.unsafeGetStorageImpl()] = tensor.storage();
      known = storages_.emplace(source, std::move(view)).first;
    }
    Tensor made = tensor_on(known->second, tensor);
    if (tensor.unsafeGetTensorImpl()->is_wrapped_number()) made.unsafeGetTensorImpl()->set_wrapped_number(true);
    pairs_.emplace_back(tensor, made);
    return made;
  }

  Tensor result(const Tensor& made) {
    if (!made.defined() || made.device().type() != c10::kCPU) return made;
    for (auto& [original, shown] : pairs_)
      if (shown.is_same(made)) return original;
    auto* source = made.storage().unsafeGetStorageImpl();
    auto known = back_.find(source);
    if (known == back_.end()) {
      c10::Storage ours(
          c10::Storage::use_byte_size_t(), made.storage().nbytes(), own(made.storage()), &device_allocator, true);
      known = back_.emplace(source, std::move(ours)).first;
    }
    for (auto& [original, shown] : pairs_)
      if (shown.storage().unsafeGetStorageImpl() == source) {
        const auto keys = original.key_set();
        return tensor_on(known->second, made, &keys);
      }
    return tensor_on(known->second, made);
  }

  void finish() {  // what a call may have changed beside contents
    for (auto& [original, shown] : pairs_) {
      auto* ours = original.storage().unsafeGetStorageImpl();
      if (shown.storage().data() != ours->data()) {
        ours->set_data_ptr(own(shown.storage()));
        ours->set_nbytes(shown.storage().nbytes());
      }
      if (original.sizes() != shown.sizes() || original.strides() != shown.strides() ||
          original.storage_offset() != shown.storage_offset())
        original.unsafeGetTensorImpl()->set_sizes_and_strides(
            shown.sizes(), shown.strides(), shown.storage_offset());
    }
  }

 private:
  std::unordered_map<c10::StorageImpl*, c10::Storage> storages_, back_;
  std::vector<std::pair<Tensor, Tensor>> pairs_;
};

// ---- what CUDA refuses, and what makes the host wait ----

const std::set<std::string> INDEXED{  // indices may lie on the host
    "aten::index", "aten::index_put", "aten::_index_put_impl", "aten::_unsafe_index", "aten::_unsafe_index_put"};
const std::set<std::string> NO_HOST_NUMBERS{  // not even of one element
    "aten::index_select", "aten::gather", "aten::embedding", "aten::cat", "aten::stack", "aten::scatter",
    "aten::scatter_add", "aten::index_add", "aten::index_copy", "aten::mm", "aten::addmm", "aten::bmm",
    "aten::convolution", "aten::grid_sampler_2d", "aten::native_layer_norm", "aten::native_group_norm"};
const std::set<std::string> NO_INTEGERS{
    "aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::addmv", "aten::dot", "aten::vdot",
    "aten::addbmm", "aten::convolution"};
const std::set<std::string> EIGHT_BITS{  // what CUDA has for float8 beside views, as ATen/native/cuda tells
    "aten::fill", "aten::zero", "aten::cat", "aten::index", "aten::index_select", "aten::index_put",
    "aten::_index_put_impl", "aten::_scaled_mm", "aten::_scaled_mm_v2", "aten::eq", "aten::ne", "aten::where", "aten::flip",
    "aten::roll", "aten::set", "aten::resize", "aten::gather", "aten::scatter", "aten::masked_fill",
    "aten::_local_scalar_dense", "aten::record_stream", "aten::equal"};
const std::set<std::string> WAITS{
    "aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::_unique", "aten::_unique2",
    "aten::unique_dim", "aten::unique_consecutive", "aten::unique_dim_consecutive", "aten::bincount",
    "aten::equal", "aten::repeat_interleave", "aten::histc", "aten::is_set_to", "aten::linalg_cholesky_ex",
    "aten::_linalg_solve_ex", "aten::linalg_inv_ex", "aten::_linalg_svd", "aten::_linalg_eigh"};

std::string base_name(const c10::FunctionSchema& schema) {
  std::string name = schema.name();
  if (name.size() > 7 && name.back() == '_' && name[name.size() - 2] != '_') name.pop_back();
  return name;
}

bool makes_views(const c10::FunctionSchema& schema) {
  for (const auto& each : schema.returns())
    if (each.alias_info() && !each.alias_info()->isWrite()) return true;
  return false;
}

struct Operands {
  const c10::FunctionSchema& schema;
  std::string name;
  bool is_view;
  bool has_mask = false;

  void check(const Tensor& tensor, const std::string& argument) {
    if (!tensor.defined()) return;
    const auto type = tensor.scalar_type();
    if (is_here(tensor)) {
      const bool is_index = argument == "indices" && INDEXED.count(name);
      has_mask |= is_index && name != "aten::index" && (type == c10::kBool || type == c10::kByte);
      TORCH_CHECK_NOT_IMPLEMENTED(
          !c10::isIntegralType(type, true) || !NO_INTEGERS.count(name),
          "\"", name.substr(6), "_cuda\" not implemented for '", c10::toString(type), "'");
      TORCH_CHECK_NOT_IMPLEMENTED(
          !c10::isFloat8Type(type) || is_view || EIGHT_BITS.count(name),
          "\"", name.substr(6), "_cuda\" not implemented for '", c10::toString(type), "'");
      return;
    }
    if (tensor.device().type() != c10::kCPU) return;  // meta: its own kernels complain
    const bool may_be_host = tensor.dim() == 0 && !NO_HOST_NUMBERS.count(name);
    if (argument == "indices" && INDEXED.count(name)) {
      if (name != "aten::index") wait("indices from the host", name);  // index itself asks before
      return;
    }
    TORCH_CHECK(
        may_be_host, "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and "
        "cpu! (when checking argument for argument ", argument, " in ", schema.name(), ")");
  }
};

void run_on_cpu(const c10::OperatorHandle& op, Stack* stack) {
  const auto& schema = op.schema();
  Operands operands{schema, base_name(schema), makes_views(schema)};
  Shown shown;
  const size_t count = schema.arguments().size(), first = stack->size() - count;
  for (size_t place = 0; place < count; ++place) {
    auto& value = (*stack)[first + place];
    const auto& argument = schema.arguments()[place];
    const auto& name = argument.name();
    const bool is_random = argument.type()->str().find("Generator") != std::string::npos;
    if (is_random) {
      value = inner_of(value.isNone() ? default_generator() : value.toGenerator());
    } else if (value.isTensor()) {
      operands.check(value.toTensor(), name);
      value = shown.show(value.toTensor());
    } else if (value.isTensorList()) {
      c10::List<Tensor> made;
      for (const Tensor& each : value.toTensorVector()) {
        operands.check(each, name);
        made.push_back(shown.show(each));
      }
      value = made;
    } else if (value.isOptionalTensorList()) {
      c10::List<std::optional<Tensor>> made;
      for (const auto& each : value.toOptionalTensorVector()) {
        if (each) operands.check(*each, name);
        made.push_back(each ? std::optional<Tensor>(shown.show(*each)) : std::nullopt);
      }
      value = made;
    } else if (value.isDevice() && value.toDevice().type() == c10::kCUDA) {
      value = c10::Device(c10::kCPU);
    }
  }
  if (WAITS.count(operands.name)) wait("reads the device", operands.name);
  if (operands.has_mask) wait("mask as index", operands.name);
  {
    at::AutoDispatchBelowADInplaceOrView below;
    c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
    op.callBoxed(stack);
  }
  const size_t results = schema.returns().size(), start = stack->size() - results;
  for (size_t place = 0; place < results; ++place) {
    auto& value = (*stack)[start + place];
    if (value.isTensor()) {
      value = shown.result(value.toTensor());
    } else if (value.isTensorList()) {
      c10::List<Tensor> made;
      for (const Tensor& each : value.toTensorVector()) made.push_back(shown.result(each));
      value = made;
    }
  }
  shown.finish();
}

// ---- kernels of our own ----

Tensor empty(
    c10::IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
    std::optional<at::Device>, std::optional<bool> pin_memory, std::optional<at::MemoryFormat> format) {
  TORCH_CHECK(!pin_memory.value_or(false), "Only dense CPU tensors can be pinned");
  return at::detail::empty_generic(
      size, &device_allocator, c10::DispatchKeySet(c10::DispatchKey::CUDA),
      dtype.value_or(at::get_default_dtype_as_scalartype()), format);
}

Tensor empty_strided(
    c10::IntArrayRef size, c10::IntArrayRef stride, std::optional<at::ScalarType> dtype,
    std::optional<at::Layout>, std::optional<at::Device>, std::optional<bool> pin_memory) {
  TORCH_CHECK(!pin_memory.value_or(false), "Only dense CPU tensors can be pinned");
  return at::detail::empty_strided_generic(
      size, stride, &device_allocator, c10::DispatchKeySet(c10::DispatchKey::CUDA),
      dtype.value_or(at::get_default_dtype_as_scalartype()));
}

Tensor& copy_(Tensor& self, const Tensor& source, bool non_blocking) {
  if (is_here(self) != is_here(source)) {
    const Tensor& host = is_here(self) ? source : self;
    const std::string sizes = c10::str(source.sizes());
    if (self.numel() > 0) {
      if (!non_blocking) wait(is_here(self) ? "copy to the device" : "copy to the host", sizes);
      else if (!is_here(self) && !is_pinned(host.storage().data()))
        wait("copy to pageable memory of the host", sizes);
    }
  }
  Shown shown;
  Tensor target = shown.show(self), from = shown.show(source);
  at::AutoDispatchBelowADInplaceOrView below;
  c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  at::native::copy_(target, from, false);
  return self;
}

Tensor copy_from(const Tensor& self, const Tensor& target, bool non_blocking) {
  Tensor written = target;
  return copy_(written, self, non_blocking);
}

void record_stream(Tensor&, c10::Stream) {}

Tensor& set_storage(
    Tensor& self, c10::Storage source, int64_t offset, c10::IntArrayRef size, c10::IntArrayRef stride) {
  TORCH_CHECK(source.device() == self.device(), "Attempted to set a storage on a different device");
  auto* impl = self.unsafeGetTensorImpl();
  impl->set_storage_keep_dtype(std::move(source));
  if (stride.data() == nullptr || (stride.empty() && !size.empty())) {
    impl->set_storage_offset(offset);
    impl->set_sizes_contiguous(size);
  } else {
    impl->set_sizes_and_strides(size, stride, offset);
  }
  return self;
}

Tensor& set_whole(Tensor& self, c10::Storage source) {
  const int64_t count = source.nbytes() / self.dtype().itemsize();
  return set_storage(self, std::move(source), 0, {count}, {});
}

Tensor attention(  // by the rules and kernels of the CPU: CUDA's own would give other last bits
    const Tensor& query, const Tensor& key, const Tensor& value, const std::optional<Tensor>& mask,
    double dropout, bool causal, std::optional<double> scale, bool gqa) {
  int64_t choice = 0;
  {
    Shown shown;
    at::AutoDispatchBelowADInplaceOrView below;
    const auto seen = mask ? std::optional<Tensor>(shown.show(*mask)) : std::nullopt;
    choice = at::_fused_sdp_choice(
        shown.show(query), shown.show(key), shown.show(value), seen, dropout, causal, scale, gqa);
  }
  if (choice != 1)
    return std::get<0>(at::_scaled_dot_product_attention_math(
        query, key, value, mask, dropout, causal, std::nullopt, scale, gqa));
  auto added = mask;
  if (added && added->scalar_type() == at::kBool)
    added = at::zeros_like(*added, query.options()).masked_fill_(added->logical_not(), -INFINITY);
  return std::get<0>(at::_scaled_dot_product_flash_attention_for_cpu(
      query, key, value, dropout, causal, added, scale));
}

const c10::impl::DeviceGuardImplRegistrar guard(c10::DeviceType::CUDA, new Guard());

}  // namespace emulated

namespace at {
using CUDAHooks = emulated::Hooks;
REGISTER_CUDA_HOOKS(CUDAHooks)
}  // namespace at

TORCH_LIBRARY_IMPL(_, CUDA, library) {
  library.fallback(torch::CppFunction::makeFromBoxedFunction<&emulated::run_on_cpu>());
}

TORCH_LIBRARY_IMPL(aten, CUDA, library) {
  c10::SetAllocator(c10::DeviceType::CUDA, &emulated::device_allocator);
  library.impl("empty.memory_format", emulated::empty);
  library.impl("empty_strided", emulated::empty_strided);
  library.impl("copy_", emulated::copy_);
  library.impl("_copy_from", emulated::copy_from);
  library.impl("record_stream", emulated::record_stream);
  library.impl("set_.source_Storage", emulated::set_whole);
  library.impl("set_.source_Storage_storage_offset", emulated::set_storage);
  library.impl("scaled_dot_product_attention", emulated::attention);
  // Torch would compose these of others, because CUDA's kernels are not there: all that have one for the CPU.
  const std::set<std::string> ours{"aten::copy_", "aten::empty.memory_format", "aten::empty_strided"};
  auto& all = c10::Dispatcher::singleton();
  std::set<std::string> composed;
  for (auto key : {c10::DispatchKey::CompositeExplicitAutograd, c10::DispatchKey::CompositeImplicitAutograd})
    for (const auto& each : all.getRegistrationsForDispatchKey(key)) composed.insert(c10::toString(each));
  for (const auto& each : all.getRegistrationsForDispatchKey(c10::DispatchKey::CPU)) {
    const std::string name = c10::toString(each);
    if (name.rfind("aten::", 0) == 0 && composed.count(name) && !ours.count(name))
      library.impl(name.c_str(), torch::CppFunction::makeFromBoxedFunction<&emulated::run_on_cpu>());
  }
  for (const char* name : {"convolution", "convolution_backward"})
    library.impl(name, torch::CppFunction::makeFromBoxedFunction<&emulated::run_on_cpu>());
}

TORCH_LIBRARY_IMPL(aten, AutogradCUDA, library) {
  library.impl("scaled_dot_product_attention", emulated::attention);
}

extern "C" {
void emulated_report_waits_to(emulated::Report report) { emulated::report_wait = report; }
size_t emulated_allocated() { return emulated::allocated; }
size_t emulated_most_allocated() { return emulated::most_allocated; }
void emulated_forget_most_allocated() { emulated::most_allocated = emulated::allocated; }
void emulated_pin(uintptr_t address, size_t bytes) {
  std::lock_guard<std::mutex> hold(emulated::memory_lock);
  emulated::pinned[address] = bytes;
}
int emulated_unpin(uintptr_t address) {
  std::lock_guard<std::mutex> hold(emulated::memory_lock);
  return emulated::pinned.erase(address) == 1;
}
}
