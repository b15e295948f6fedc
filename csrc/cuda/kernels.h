// The entry points of the CUDA kernels: free of torch and of CUDA's headers. Each enqueues its work
// on the stream of the current device, allocates nothing, never waits, and returns a CUDA error
// code, 0 where all launches were accepted.
#pragma once

#include "../activate.h"
#include "../batch_norm.h"
#include "../fill_feedback.h"
#include "../gate.h"
#include "../layer_norm.h"
#include "project_gate.h"

struct CUstream_st;

namespace fastdfa::cuda {

using Stream = CUstream_st*;

const char* error_text(int code);

int fill_feedback(const FillFeedbackParams& p, Stream stream);

// scratch: plan.scratch_bytes, aligned to 256 bytes; see plan_project_gate.
int project_gate(const ProjectGateParams& p, const ProjectGatePlan& plan, void* scratch,
                 Stream stream);

// bias_partial: [gate_chunks(p), columns].
int64_t gate_chunks(const GateParams& p);
int gate(const GateParams& p, Stream stream);

// Second stage of the bias gradients of `count` layers, in a fixed order.
int sum_chunks(const SumChunksParams* list, int64_t count, Stream stream);

int activate(const ActivateParams& p, Stream stream);

int batch_norm(const BatchNormParams& p, Stream stream);
int batch_norm_backward(const BatchNormBackwardParams& p, Stream stream);

int layer_norm(const LayerNormParams& p, Stream stream);
// weight_partial, a_partial: [layer_norm_backward_chunks(p), columns].
int64_t layer_norm_backward_chunks(const LayerNormBackwardParams& p);
int layer_norm_backward(const LayerNormBackwardParams& p, Stream stream);

}  // namespace fastdfa::cuda
