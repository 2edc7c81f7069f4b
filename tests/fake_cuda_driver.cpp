// A libcuda for tests: keeps a log of what is called, and runs the kernels of kernels.cu on the CPU.
// Built with: g++ -shared -fPIC -DARCHITECTURE=900 -DSOURCE='"…/kernels.cu"'

#include "cuda_emulation.h"

#define __CUDA_ARCH__ ARCHITECTURE
#include SOURCE

#include <map>
#include <string>

#include <dlfcn.h>

namespace {

struct Module { void* context; };
struct Function { Module* module; std::string name; void* address; };

std::string log_text, failing;
int failing_status, capture_mode = 0;
std::map<int, int> contexts;         // device -> anything with an address
thread_local std::vector<void*> current_contexts;

int enter(const char* function, const std::string& details = "") {
    log_text += std::string(function) + details + "\n";
    return failing == function ? failing_status : 0;
}

std::string text(const void* context) {
    for (auto& [device, anything] : contexts)
        if (&anything == context) return " on " + std::to_string(device);
    return " on nothing";
}

}  // namespace

extern "C" {

const char* fake_log() { return log_text.c_str(); }
void fake_reset() { log_text.clear(), failing.clear(); }
void fake_fail(const char* function, int status) { failing = function, failing_status = status; }
int fake_depth() { return (int)current_contexts.size(); }

int cuInit(unsigned) { return enter("cuInit"); }

int cuDeviceGet(int* handle, int device) {
    *handle = device;
    return enter("cuDeviceGet");
}

int cuDevicePrimaryCtxRetain(void** context, int device) {
    *context = &contexts[device];
    return enter("cuDevicePrimaryCtxRetain");
}

int cuCtxPushCurrent_v2(void* context) {
    current_contexts.push_back(context);
    return 0;
}

int cuCtxPopCurrent_v2(void** context) {
    if (current_contexts.empty()) return 201;
    *context = current_contexts.back();
    current_contexts.pop_back();
    return 0;
}

int cuCtxGetCurrent(void** context) {
    *context = current_contexts.empty() ? nullptr : current_contexts.back();
    return 0;
}

// What cudaSetDevice of another CUDA runtime does.
void fake_switch() { current_contexts.back() = &contexts[99]; }

int cuThreadExchangeStreamCaptureMode(int* mode) {
    std::swap(*mode, capture_mode);
    return 0;
}

int cuGetErrorString(int status, const char** text) {
    *text = status == 209 ? "no kernel image is available" : "something else";
    return 0;
}

int cuModuleLoadData(void** module, const char* data) {
    if (current_contexts.empty()) return 201;
    *module = new Module{current_contexts.back()};
    const std::string mode = " mode " + std::to_string(capture_mode);
    return enter("cuModuleLoadData", text(current_contexts.back()) + mode + " " + std::string(data, 4));
}

int cuModuleGetFunction(void** function, Module* module, const char* name) {
    Dl_info self;
    dladdr((void*)fake_log, &self);
    void* address = dlsym(dlopen(self.dli_fname, RTLD_NOW | RTLD_NOLOAD), name);
    if (!address) return 500;
    *function = new Function{module, name, address};
    return 0;
}

int cuLaunchKernel(Function* function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
                   unsigned block_y, unsigned block_z, unsigned shared_bytes, void* stream, void** params,
                   void** extra) {
    char details[256];
    snprintf(details, sizeof details, " %s grid %u %u %u block %u %u %u shared %u stream %zu", function->name.c_str(),
             grid_x, grid_y, grid_z, block_x, block_y, block_z, shared_bytes, (size_t)stream);
    if (current_contexts.empty() || current_contexts.back() != function->module->context || extra) return 400;
    if (int status = enter("cuLaunchKernel", details + text(current_contexts.back()))) return status;

    auto pointer = [params](int i) { return *(void**)params[i]; };
    auto number = [params](int i) { return *(u32*)params[i]; };
    if (function->name.rfind("dequantize", 0) == 0) {
        auto kernel = (void (*)(void*, void*, void*, u32, u32, u32))function->address;
        emulate({grid_x, grid_y, grid_z}, block_x,
                [=] { kernel(pointer(0), pointer(1), pointer(2), number(3), number(4), number(5)); });
    } else {
        auto kernel = (void (*)(void*, void*, void*, void*, u32, u32, u32, u32))function->address;
        emulate({grid_x, grid_y, grid_z}, block_x, [=] {
            kernel(pointer(0), pointer(1), pointer(2), pointer(3), number(4), number(5), number(6), number(7));
        });
    }
    return 0;
}

}  // extern "C"
