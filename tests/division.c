/* Is fl(t + e r), with r = fl(1 / s), t = fl(x r) and e = fl(x - t s), always fl(x / s)? (csrc/qn_quantize.h divides so.)
 *
 * Before it is rounded, t + e r differs from x / s by little, so that both round to the same float unless the middle M 2^-24
 * between two floats lies as near. With S and X the significands as integers, 2^23 <= S < 2^24, and X doubled where it is less
 * than S, so that 1 <= X / S < 2 (M odd, of 25 bits):
 *     r differs from 1 / s by half of its last place, 2^-25 where s is in [1, 2): x r differs from x / s by less than 2^-23,
 *     t by another 2^-24, and e, of 25 bits at most, from x - t s by at most 2^-46; so t + e r from x / s by less than
 *     3 * 2^-24 * 2^-24 + 2^-46 / 2 = 5 * 2^-48,
 *     while x / s differs from the middle by |2^24 X - M S| / (2^24 S), which is more than |2^24 X - M S| * 2^-48.
 * So only those X can be wrong for which 2^24 X is within 5 of a multiple of S. For every S they are few: all of them are
 * tried here (within 8).
 *
 * division [STRIDE]: every STRIDE-th S (default 1) and the first and last thousand; prints how many X were tried and how many
 * are wrong, and how many would be without the step; ends with 1 if any is wrong.
 */
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

enum { NEAR = 8, ENDS = 1000 };
static const uint32_t least = 1u << 23, most = (1u << 24) - 1;

/* 1 / 2^n modulo an odd number */
static uint64_t inverse_of_power(int n, uint64_t modulus) {
    uint64_t half = (modulus + 1) / 2 % modulus, result = 1 % modulus;
    while (n--) result = result * half % modulus;
    return result;
}

int main(int argc, char **argv) {
    uint32_t stride = argc > 1 ? (uint32_t)strtoul(argv[1], NULL, 10) : 1;
    long tried = 0, wrong = 0, without = 0;
    for (uint32_t s = least; s <= most; s++) {
        if ((s - least) % stride && s - least >= ENDS && most - s >= ENDS) continue;
        int twos = __builtin_ctz(s);
        uint64_t odd = s >> twos;
        if (twos > 3) continue; /* 2^24 X and M S are multiples of 16 then: no nearer than that */
        uint64_t inverse = inverse_of_power(24 - twos, odd);
        for (int distance = -NEAR; distance <= NEAR; distance++) {
            if (distance == 0 || distance % (1 << twos)) continue;
            int64_t d = distance / (1 << twos), m = (int64_t)odd; /* 2^(24 - twos) X is d, modulo odd */
            uint64_t first = (uint64_t)((d % m + m) % m) * inverse % odd;
            for (uint64_t x = first + s / odd * odd; x < 2ull * s; x += odd) {
                if (x < s || (x > most && x % 2)) continue;
                float a = (float)x, b = (float)s, r = 1.0f / b, t = a * r, q = fmaf(fmaf(-t, b, a), r, t);
                tried++;
                wrong += q != a / b;
                without += t != a / b;
            }
        }
    }
    printf("tried %ld wrong %ld without %ld\n", tried, wrong, without);
    return wrong != 0;
}
