// What the programs that compare kernels with plain loops share.
#pragma once

#include <cmath>
#include <cstdio>
#include <cstdlib>

#include "cuda/device.cuh"

namespace {

using namespace mtl::cuda;

double worst = 0;  // error, as a part of what is allowed

void expect(double got, double wanted, double size, double eps) {
  const double error = got == got ? fabs(got - wanted) / (eps * (size + 1e-3)) : 1e30;
  worst = error > worst ? error : worst;
}
void check(cudaError_t error) {
  if (error == cudaSuccess) return;
  printf("a launch: %s\n", cudaGetErrorString(error));
  exit(2);
}

double number(double v) { return v; }
double number(float v) { return v; }
template <class T>
double number(T v) {
  return to_float(v);
}

}  // namespace
