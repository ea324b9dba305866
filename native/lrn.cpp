// Local response normalisation over rows of contiguous channels, and the max pool after it. The build defines SIZE, the
// window.
//
// It normalises the activations max(x, floor): with a floor of 0, those of a ReLU; with minus infinity, x itself.
// The backward pass recomputes the window sums from the activations, which is cheaper than storing and loading them.
// Each pixel is a row of contiguous channels. A tile of rows stays in the first-level cache while simple loops, which
// compilers vectorise, process it. With the pool, a thread normalises the lines of one image after the other, and
// takes the maxima while they are in the cache: the normalised maps and their gradient are never in memory.

#include <algorithm>
#include <cmath>
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

struct Constants {
    int64_t channels;
    float alpha, k, floor;
};

// The formula and its gradient over rows of channels, with the memory that they need.
class Normaliser {
public:
    explicit Normaliser(const Constants& constants)
        : tile(std::max<int64_t>(1, TILE_VALUES / std::max<int64_t>(1, constants.channels))),
          constants(constants),
          padded(constants.channels + 2 * HALF),
          squares(tile * padded),
          shared(tile * padded),
          own(tile * constants.channels) {}

    const int64_t tile;  // rows that are processed together

    template <class T>
    void forward(const T* x, T* y, int64_t rows) {
        const int64_t channels = constants.channels;
        const float alpha = constants.alpha, k = constants.k, floor = constants.floor;
        for (; rows > 0; rows -= tile, x += tile * channels, y += tile * channels) {
            const int64_t count = std::min(tile, rows);
            square(x, count);
            for (int64_t row = 0; row < count; ++row) {
                const T* a = x + row * channels;
                T* b = y + row * channels;
                const float* q = &squares[row * padded];
#pragma omp simd
                for (int64_t c = 0; c < channels; ++c)
                    store(b + c, activation(load(a[c]), floor) * power(scale(q + c, alpha, k)));
            }
        }
    }

    template <class T, class G>
    void backward(const T* x, const G* gy, T* gx, int64_t rows) {
        const int64_t channels = constants.channels;
        const float alpha = constants.alpha, k = constants.k, floor = constants.floor;
        for (; rows > 0; rows -= tile, x += tile * channels, gy += tile * channels, gx += tile * channels) {
            const int64_t count = std::min(tile, rows);
            square(x, count);
            for (int64_t row = 0; row < count; ++row) {
                const T* a = x + row * channels;
                const G* g = gy + row * channels;
                const float* q = &squares[row * padded];
                float *d = &own[row * channels], *w = &shared[row * padded + HALF];
#pragma omp simd
                for (int64_t c = 0; c < channels; ++c) {
                    const float s = scale(q + c, alpha, k);
                    const float through = load(g[c]) * power(s);
                    d[c] = through;
                    w[c] = through * activation(load(a[c]), floor) / s;
                }
            }
            for (int64_t row = 0; row < count; ++row) {
                const T* a = x + row * channels;
                T* out = gx + row * channels;
                const float *d = &own[row * channels], *w = &shared[row * padded];
#pragma omp simd
                for (int64_t c = 0; c < channels; ++c) {
                    const float v = load(a[c]);
                    const float gradient = d[c] - 1.5f * alpha * v * window_sum(w + c);
                    store(out + c, v <= floor ? 0.0f : gradient);
                }
            }
        }
    }

private:
    template <class T>
    void square(const T* x, int64_t count) {
        const int64_t channels = constants.channels;
        const float floor = constants.floor;
        for (int64_t row = 0; row < count; ++row) {
            const T* a = x + row * channels;
            float* q = &squares[row * padded + HALF];
            for (int64_t c = 0; c < channels; ++c) {
                const float v = activation(load(a[c]), floor);
                q[c] = v * v;
            }
        }
    }

    const Constants constants;
    const int64_t padded;
    std::vector<float> squares, shared;  // rows with HALF more values on either side, which stay 0
    std::vector<float> own;
};

template <class T>
void forward(const T* x, T* y, int64_t rows, const Constants& constants, int threads) {
#pragma omp parallel num_threads(threads)
    {
        Normaliser lrn(constants);
#pragma omp for
        for (int64_t first = 0; first < rows; first += lrn.tile) {
            const int64_t offset = first * constants.channels;
            lrn.forward(x + offset, y + offset, std::min(lrn.tile, rows - first));
        }
    }
}

template <class T>
void backward(const T* x, const T* gy, T* gx, int64_t rows, const Constants& constants, int threads) {
#pragma omp parallel num_threads(threads)
    {
        Normaliser lrn(constants);
#pragma omp for
        for (int64_t first = 0; first < rows; first += lrn.tile) {
            const int64_t offset = first * constants.channels;
            lrn.backward(x + offset, gy + offset, gx + offset, std::min(lrn.tile, rows - first));
        }
    }
}

// --- with the max pool -----------------------------------------------------------------------------------------

// A max pool without padding: windows of side x side pixels at every stride-th pixel.
struct Pool {
    int64_t height, width;  // of the maps before the pool
    int64_t side, stride;

    int64_t pooled_height() const { return (height - side) / stride + 1; }
    int64_t pooled_width() const { return (width - side) / stride + 1; }
};

// An integer that sorts like the value, NaN highest. Those of bfloat16 have 16 bits, so a register holds twice as many.
inline int32_t ordered(float value) {
    int32_t bits;
    value = value != value ? NAN : value + 0.0f;  // -0 becomes 0
    std::memcpy(&bits, &value, sizeof bits);
    return bits ^ (bits >> 31 & 0x7fffffff);
}
inline int16_t ordered(uint16_t half) { return ordered(load(half)) >> 16; }
inline void restore(float* value, int32_t key) {
    key ^= key >> 31 & 0x7fffffff;
    std::memcpy(value, &key, sizeof key);
}
inline void restore(uint16_t* half, int16_t key) { *half = key ^ (key >> 15 & 0x7fff); }

template <class Key>
constexpr int64_t BLOCK = 64 / sizeof(Key);  // channels that are compared together

// Stores the largest of the pixels of a window in y and its position in the window, side * row + column, the first of
// equal ones. `rows` are the window's first pixels in its `side` rows.
template <class Key, class T>
void largest(const Key* const* rows, const Pool& pool, int64_t channels, T* y, uint8_t* position) {
    for (int64_t first = 0; first < channels; first += BLOCK<Key>) {
        Key best[BLOCK<Key>], where[BLOCK<Key>];
        int tap = 0;
        for (int64_t row = 0; row < pool.side; ++row) {
            const Key* pixel = rows[row] + first;
            for (int64_t column = 0; column < pool.side; ++column, ++tap, pixel += channels)
#pragma omp simd
                for (int c = 0; c < BLOCK<Key>; ++c) {
                    const bool larger = !tap || pixel[c] > best[c];
                    best[c] = larger ? pixel[c] : best[c];
                    where[c] = larger ? tap : where[c];
                }
        }
        for (int64_t c = 0; c < std::min(BLOCK<Key>, channels - first); ++c) {
            restore(y + first + c, best[c]);
            position[first + c] = where[c];
        }
    }
}

template <class T>
void forward_pooled(
    const T* x, T* y, uint8_t* position, int64_t images, const Pool& pool, const Constants& constants,
    int threads) {
    using Key = decltype(ordered(T()));
    const int64_t channels = constants.channels, line = pool.width * channels;
    const int64_t height = pool.pooled_height(), width = pool.pooled_width();
    // few images are split further, so that each thread gets some bands; each normalises its first lines again
    const int64_t bands = std::clamp<int64_t>(4 * threads / std::max<int64_t>(1, images), 1, height);
#pragma omp parallel num_threads(threads)
    {
        Normaliser lrn(constants);
        std::vector<T> normalised(line);
        // line h is at h % side; `largest` reads up to a block beyond the last one
        std::vector<Key> lines(pool.side * line + BLOCK<Key>);
        std::vector<const Key*> rows(pool.side);
#pragma omp for
        for (int64_t task = 0; task < images * bands; ++task) {
            const int64_t image = task / bands, band = task % bands;
            int64_t h = 0;
            for (int64_t top = height * band / bands; top < height * (band + 1) / bands; ++top) {
                for (h = std::max(h, top * pool.stride); h < top * pool.stride + pool.side; ++h) {
                    lrn.forward(x + (image * pool.height + h) * line, normalised.data(), pool.width);
                    Key* keys = &lines[h % pool.side * line];
                    for (int64_t i = 0; i < line; ++i) keys[i] = ordered(normalised[i]);
                }
                for (int64_t left = 0; left < width; ++left) {
                    for (int64_t row = 0; row < pool.side; ++row)
                        rows[row] =
                            &lines[(top * pool.stride + row) % pool.side * line + left * pool.stride * channels];
                    const int64_t to = ((image * height + top) * width + left) * channels;
                    largest(rows.data(), pool, channels, y + to, position + to);
                }
            }
        }
    }
}

template <class T>
void backward_pooled(
    const T* x, const T* gy, const uint8_t* position, T* gx, int64_t images, const Pool& pool,
    const Constants& constants, int threads) {
    const int64_t channels = constants.channels, line = pool.width * channels;
    const int64_t height = pool.pooled_height(), width = pool.pooled_width();
#pragma omp parallel num_threads(threads)
    {
        Normaliser lrn(constants);
        std::vector<float> gradient(line);  // of a line of the normalised maps
#pragma omp for collapse(2)
        for (int64_t image = 0; image < images; ++image) {
            for (int64_t h = 0; h < pool.height; ++h) {
                std::fill(gradient.begin(), gradient.end(), 0.0f);
                for (int64_t top = 0; top < height; ++top) {
                    const int64_t row = h - top * pool.stride;  // of the windows at `top`
                    if (row < 0 || row >= pool.side) continue;
                    for (int64_t left = 0; left < width; ++left) {
                        const int64_t from = ((image * height + top) * width + left) * channels;
                        for (int64_t column = 0; column < pool.side; ++column) {
                            const int tap = row * pool.side + column;
                            float* pixel = &gradient[(left * pool.stride + column) * channels];
#pragma omp simd
                            for (int64_t c = 0; c < channels; ++c)
                                pixel[c] += position[from + c] == tap ? load(gy[from + c]) : 0.0f;
                        }
                    }
                }
                const int64_t offset = (image * pool.height + h) * line;
                lrn.backward(x + offset, gradient.data(), gx + offset, pool.width);
            }
        }
    }
}

}  // namespace

extern "C" {

#define FUNCTIONS(TYPE, T)                                                                                      \
    void forward_##TYPE(                                                                                        \
        const T* x, T* y, int64_t rows, int64_t channels, float alpha, float k, float floor, int64_t threads) { \
        forward(x, y, rows, {channels, alpha, k, floor}, threads);                                              \
    }                                                                                                           \
    void backward_##TYPE(                                                                                       \
        const T* x, const T* gy, T* gx, int64_t rows, int64_t channels, float alpha, float k, float floor,      \
        int64_t threads) {                                                                                      \
        backward(x, gy, gx, rows, {channels, alpha, k, floor}, threads);                                        \
    }                                                                                                           \
    void forward_pooled_##TYPE(                                                                                 \
        const T* x, T* y, uint8_t* position, int64_t images, int64_t height, int64_t width, int64_t side,       \
        int64_t stride, int64_t channels, float alpha, float k, float floor, int64_t threads) {                 \
        forward_pooled(                                                                                         \
            x, y, position, images, {height, width, side, stride}, {channels, alpha, k, floor}, threads);       \
    }                                                                                                           \
    void backward_pooled_##TYPE(                                                                                \
        const T* x, const T* gy, const uint8_t* position, T* gx, int64_t images, int64_t height, int64_t width, \
        int64_t side, int64_t stride, int64_t channels, float alpha, float k, float floor, int64_t threads) {   \
        backward_pooled(                                                                                        \
            x, gy, position, gx, images, {height, width, side, stride}, {channels, alpha, k, floor}, threads);  \
    }

FUNCTIONS(float32, float)
FUNCTIONS(bfloat16, uint16_t)

}  // extern "C"
