// The library's plain C interface. Every function that can fail returns why it did, or null; the text lives until the
// thread's next call.
#pragma once

#include "sample.h"
#include "scan.h"

#define APV_EXPORT extern "C" __attribute__((visibility("default")))

APV_EXPORT int64_t apv_scan_bytes(void);  // of ApvScan, for a check of the two sides' agreement

// What GPUs there is code for, compute capabilities times 100: "800,900".
APV_EXPORT const char* apv_architectures(void);

APV_EXPORT const char* apv_probe(void);  // why the current device cannot run the kernels

// Fills blocks, shared_bytes and workspace_bytes for the sizes and the current device.
APV_EXPORT const char* apv_plan_forward(ApvScan* scan);
APV_EXPORT const char* apv_plan_backward(ApvScan* scan);

// Launches on a stream of the current device, after a memset of a part of the workspace. Never waits.
APV_EXPORT const char* apv_forward(const ApvScan* scan, void* stream);
APV_EXPORT const char* apv_backward(const ApvScan* scan, void* stream);

APV_EXPORT const char* apv_sample(const ApvSample* sample, int backward, void* stream);
