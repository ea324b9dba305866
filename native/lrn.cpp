// Local response normalisation over rows of contiguous channels. The build defines SIZE, the window.
//
// It normalises the activations max(x, floor): with a floor of 0, those of a ReLU; with minus infinity, x itself.
// The backward pass recomputes the window sums from the activations, which is cheaper than storing and loading them.
// Each pixel is a row of contiguous channels. A tile of rows stays in the first-level cache while simple loops, which
// compilers vectorise, process it.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "bfloat16.h"

namespace {

constexpr int HALF = SIZE / 2;
constexpr int TILE_VALUES = 512;

inline float window_sum(const float* values) {
    float sum = 0;
    for (int j = 0; j < SIZE; ++j) sum += values[j];
    return sum;
}

// s^-0.75 to float precision. Shifting the bits of a float right by two divides its exponent by four, which gives
// y = s^-0.25 within 3.2%. With e = 1 - s y^4, |e| < 0.125, s^-0.75 equals y^3 (1 - e)^-0.75; the last factor is
// approximated by the closest polynomial of degree 5.
inline float power(float s) {
    uint32_t bits;
    std::memcpy(&bits, &s, sizeof bits);
    bits = 0x4f581800 - (bits >> 2);
    float y;
    std::memcpy(&y, &bits, sizeof y);
    const float y2 = y * y, e = 1 - s * (y2 * y2);
    const float rest = 0.65617902f + e * (0.60145576f + e * (0.57610747f + e * 0.54945298f));
    return y2 * y * (1 + e * (0.75f + e * rest));
}

// Activations near the largest float would square to infinity, for which `power` is not valid. NaN stays NaN.
inline float scale(const float* squares, float alpha, float k) {
    return std::min(k + alpha * window_sum(squares), 1e36f);
}

// NaN stays NaN.
inline float activation(float x, float floor) { return x < floor ? floor : x; }

// Squares the activations of a tile of rows. Rows of `squares` have HALF more values on either side.
template <class T>
void square(const T* rows, float* squares, int64_t count, int channels, float floor) {
    for (int64_t row = 0; row < count; ++row) {
        const T* a = rows + row * channels;
        float* q = squares + row * (channels + 2 * HALF) + HALF;
        for (int c = 0; c < channels; ++c) {
            const float v = activation(load(a[c]), floor);
            q[c] = v * v;
        }
    }
}

template <class T>
void forward(const T* x, T* y, int64_t rows, int channels, float alpha, float k, float floor, int threads) {
    const int64_t tile = std::max(1, TILE_VALUES / channels);
    const int padded = channels + 2 * HALF;
#pragma omp parallel num_threads(threads)
    {
        std::vector<float> squares(tile * padded);  // the padding on either side of a row stays 0
#pragma omp for
        for (int64_t first = 0; first < rows; first += tile) {
            const int64_t count = std::min(tile, rows - first);
            square(x + first * channels, squares.data(), count, channels, floor);
            for (int64_t row = 0; row < count; ++row) {
                const T* a = x + (first + row) * channels;
                T* b = y + (first + row) * channels;
                const float* q = &squares[row * padded];
#pragma omp simd
                for (int c = 0; c < channels; ++c)
                    store(b + c, activation(load(a[c]), floor) * power(scale(q + c, alpha, k)));
            }
        }
    }
}

template <class T>
void backward(
    const T* x, const T* gy, T* gx, int64_t rows, int channels, float alpha, float k, float floor, int threads) {
    const int64_t tile = std::max(1, TILE_VALUES / channels);
    const int padded = channels + 2 * HALF;
#pragma omp parallel num_threads(threads)
    {
        std::vector<float> squares(tile * padded), shared(tile * padded), own(tile * channels);
#pragma omp for
        for (int64_t first = 0; first < rows; first += tile) {
            const int64_t count = std::min(tile, rows - first);
            square(x + first * channels, squares.data(), count, channels, floor);
            for (int64_t row = 0; row < count; ++row) {
                const T *a = x + (first + row) * channels, *g = gy + (first + row) * channels;
                const float* q = &squares[row * padded];
                float *d = &own[row * channels], *w = &shared[row * padded + HALF];
#pragma omp simd
                for (int c = 0; c < channels; ++c) {
                    const float s = scale(q + c, alpha, k);
                    const float through = load(g[c]) * power(s);
                    d[c] = through;
                    w[c] = through * activation(load(a[c]), floor) / s;
                }
            }
            for (int64_t row = 0; row < count; ++row) {
                const T* a = x + (first + row) * channels;
                T* out = gx + (first + row) * channels;
                const float *d = &own[row * channels], *w = &shared[row * padded];
#pragma omp simd
                for (int c = 0; c < channels; ++c) {
                    const float v = load(a[c]);
                    const float gradient = d[c] - 1.5f * alpha * v * window_sum(w + c);
                    store(out + c, v <= floor ? 0.0f : gradient);
                }
            }
        }
    }
}

}  // namespace

extern "C" {

void forward_float32(
    const float* x, float* y, int64_t rows, int channels, float alpha, float k, float floor,
    int threads) {
    forward(x, y, rows, channels, alpha, k, floor, threads);
}
void forward_bfloat16(
    const uint16_t* x, uint16_t* y, int64_t rows, int channels, float alpha, float k, float floor,
    int threads) {
    forward(x, y, rows, channels, alpha, k, floor, threads);
}
void backward_float32(
    const float* x, const float* gy, float* gx, int64_t rows, int channels, float alpha, float k,
    float floor, int threads) {
    backward(x, gy, gx, rows, channels, alpha, k, floor, threads);
}
void backward_bfloat16(
    const uint16_t* x, const uint16_t* gy, uint16_t* gx, int64_t rows, int channels, float alpha, float k,
    float floor, int threads) {
    backward(x, gy, gx, rows, channels, alpha, k, floor, threads);
}

}  // extern "C"
