use std::sync::LazyLock;

use fvm_shared::bigint::{BigInt, Sign};
use num_traits::{One, Zero};

/// Wins that an epoch has on average, over all miners.
/// Source: lotus, build/buildconstants, BlocksPerEpoch.
pub const EXPECTED_LEADERS: u64 = 5;

/// The most wins that one ticket can have. Source: lotus, chain/types, MaxWinCount.
pub const MAX_WIN_COUNT: i64 = 3 * EXPECTED_LEADERS.cast_signed();

/// Fixed point: numbers are scaled by 2^256.
const PRECISION: usize = 256;

/// exp(-x) as a quotient of two polynomials, highest power first, scaled by 2^128: part of the
/// consensus rules, because both sides must round alike. Source: Filecoin specification,
/// expected consensus, "Coefficient Approximation".
const NUMERATOR: [&str; 8] = [
    "-648770010757830093818553637600",
    "67469480939593786226847644286976",
    "-3197587544499098424029388939001856",
    "89244641121992890118377641805348864",
    "-1579656163641440567800982336819953664",
    "17685496037279256458459817590917169152",
    "-115682590513835356866803355398940131328",
    "340282366920938463463374607431768211456",
];
const DENOMINATOR: [&str; 14] = [
    "1225524182432722209606361",
    "114095592300906098243859450",
    "5665570424063336070530214243",
    "194450132448609991765137938448",
    "5068267641632683791026134915072",
    "104716890604972796896895427629056",
    "1748338658439454459487681798864896",
    "23704654329841312470660182937960448",
    "259380097567996910282699886670381056",
    "2250336698853390384720606936038375424",
    "14978272436876548034486263159246028800",
    "72144088983913131323343765784380833792",
    "224599776407103106596571252037123047424",
    "340282366920938463463374607431768211456",
];

static POLYNOMIALS: LazyLock<[Vec<BigInt>; 2]> = LazyLock::new(|| {
    let parse = |c: &[&str]| {
        c.iter()
            .map(|s| s.parse::<BigInt>().expect("a decimal number") << (PRECISION - 128))
            .collect()
    };
    [parse(&NUMERATOR), parse(&DENOMINATOR)]
});

/// Horner's rule in fixed point; the shift rounds towards minus infinity, as Go's does.
fn evaluate(p: &[BigInt], x: &BigInt) -> BigInt {
    p.iter()
        .fold(BigInt::zero(), |acc, c| ((acc * x) >> PRECISION) + c)
}

fn exp_neg(x: &BigInt) -> BigInt {
    let [num, den] = &*POLYNOMIALS;
    (evaluate(num, x) << PRECISION) / evaluate(den, x)
}

/// How many times an election proof wins: the inverse of the Poisson distribution whose mean is
/// `power / total * EXPECTED_LEADERS`, at the point that the proof's digest chooses. Zero when
/// there is no power. Source: lotus, chain/types, ElectionProof.ComputeWinCount.
#[must_use]
pub fn win_count(vrf_proof: &[u8], power: &BigInt, total: &BigInt) -> i64 {
    if power <= &BigInt::zero() || total <= &BigInt::zero() {
        return 0;
    }
    let point = BigInt::from_bytes_be(Sign::Plus, &crate::ticket_digest(vrf_proof));
    let mean = ((power * EXPECTED_LEADERS) << PRECISION) / total;
    let mut mass = exp_neg(&mean);
    let mut above = (BigInt::one() << PRECISION) - &mass;
    let mut wins = 0;
    while point < above && wins < MAX_WIN_COUNT {
        wins += 1;
        mass = ((mass / wins) * &mean) >> PRECISION;
        above -= &mass;
    }
    wins
}

#[cfg(test)]
mod tests {
    use super::*;
    use num_traits::ToPrimitive;

    fn to_f64(x: &BigInt) -> f64 {
        (x >> (PRECISION - 62)).to_f64().unwrap() / 2f64.powi(62)
    }

    #[test]
    fn the_quotient_is_the_exponential() {
        for i in 0..=500 {
            let x = (BigInt::from(i) << PRECISION) / 100;
            let want = (-f64::from(i) / 100.0).exp();
            let got = to_f64(&exp_neg(&x));
            assert!((got - want).abs() < 1e-14, "exp(-{i}/100): {got} {want}");
        }
    }

    #[test]
    fn wins_follow_power() {
        let total = BigInt::from(1000);
        let mean = |power: i64| {
            let wins: i64 = (0..4000u32)
                .map(|i| win_count(&i.to_be_bytes(), &BigInt::from(power), &total))
                .sum();
            #[expect(clippy::cast_precision_loss, reason = "a few thousand wins at most")]
            let mean = wins as f64 / 4000.0;
            mean
        };
        for (power, want) in [(1000, 5.0), (500, 2.5), (100, 0.5), (10, 0.05)] {
            let got = mean(power);
            assert!((got - want).abs() < 0.15, "power {power}: {got}");
        }
        assert_eq!(win_count(b"x", &BigInt::zero(), &total), 0);
        assert_eq!(win_count(b"x", &BigInt::from(5), &BigInt::zero()), 0);
        assert!((0..4000u32).all(|i| win_count(&i.to_be_bytes(), &total, &total) <= MAX_WIN_COUNT));
    }

    #[test]
    fn known_proofs_have_known_counts() {
        // The count is the number of Poisson steps above the digest's point; recomputed here in
        // floating point, which is exact enough away from the steps.
        for i in 0..200u32 {
            let digest = crate::ticket_digest(&i.to_le_bytes());
            let point = to_f64(&BigInt::from_bytes_be(Sign::Plus, &digest));
            let (mean, mut mass) = (2.0f64, (-2.0f64).exp());
            let (mut above, mut want) = (1.0 - mass, 0i64);
            while point < above && want < MAX_WIN_COUNT {
                want += 1;
                #[expect(clippy::cast_precision_loss, reason = "at most fifteen")]
                let k = want as f64;
                mass *= mean / k;
                above -= mass;
            }
            let got = win_count(&i.to_le_bytes(), &BigInt::from(2), &BigInt::from(5));
            assert_eq!(got, want, "proof {i}");
        }
    }
}
