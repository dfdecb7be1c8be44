//! Codebooks that learn in replicas, threads here, against one that has all rows.

use crate::common::*;
use candle_core::{DType, Device, Tensor};
use candle_flash_kmeans::{
    nn::{Codebook, Ema, EmaCodebook, EmaResidualQuantizer, ReplicaRank, Replicas},
    Error, KMeans, Metric,
};
use std::{
    sync::{Arc, Barrier, Mutex},
    thread,
};

/// What threads add up: each leaves its numbers, and takes the sum in the order of their ranks.
struct Meeting {
    barrier: Barrier,
    left: Mutex<Vec<Vec<f64>>>,
}

struct Thread {
    rank: usize,
    count: usize,
    meeting: Arc<Meeting>,
}

impl Replicas for Thread {
    fn rank(&self) -> usize {
        self.rank
    }

    fn count(&self) -> usize {
        self.count
    }

    fn all_reduce(&self, mine: &Tensor) -> candle_core::Result<Tensor> {
        assert_eq!(mine.dtype(), DType::F64);
        self.meeting.left.lock().unwrap()[self.rank] = f64s(mine);
        self.meeting.barrier.wait();
        let left = self.meeting.left.lock().unwrap().clone();
        self.meeting.barrier.wait();
        let sums: Vec<f64> = (0..left[0].len()).map(|i| left.iter().map(|numbers| numbers[i]).sum()).collect();
        Tensor::from_vec(sums, mine.shape(), mine.device())
    }
}

/// What `work` returns on each of so many replicas, in the order of their ranks.
fn on_replicas<T: Send>(count: usize, work: impl Fn(usize, Arc<dyn Replicas>) -> T + Sync) -> Vec<T> {
    let meeting = Arc::new(Meeting { barrier: Barrier::new(count), left: Mutex::new(vec![vec![]; count]) });
    thread::scope(|scope| {
        let start = |rank| {
            let (meeting, work) = (meeting.clone(), &work);
            scope.spawn(move || work(rank, Arc::new(Thread { rank, count, meeting })))
        };
        let threads: Vec<_> = (0..count).map(start).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

/// The same on ranks, each of which works on a device of these.
pub fn on_ranks<T: Send>(devices: &[Device], work: impl Fn(&Device, Arc<ReplicaRank>) -> T + Sync) -> Vec<T> {
    let replicas = ReplicaRank::threads(devices).unwrap();
    thread::scope(|scope| {
        let start = |(device, replica)| {
            let work = &work;
            scope.spawn(move || work(device, Arc::new(replica)))
        };
        let threads: Vec<_> = devices.iter().zip(replicas).map(start).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

/// Numbers of a rank whose sums depend on their order.
fn numbers(rank: usize) -> Tensor {
    uniform(&[3, 5], 0.0, 1.0, DType::F64, &mut rng(60 + rank as u64))
}

/// Holds sums of ranks on these devices to additions by hand, to the bit, several times; the ranks' numbers are not changed.
pub fn check_sums(devices: &[Device]) {
    let expected = (1..devices.len())
        .fold(f64s(&numbers(0)), |sum, rank| sum.into_iter().zip(f64s(&numbers(rank))).map(|(a, b)| a + b).collect());
    let sums = on_ranks(devices, |device, replica| {
        let mine = numbers(replica.rank()).to_device(device).unwrap();
        let sums: Vec<_> = (0..5).map(|_| replica.all_reduce(&mine).unwrap()).collect();
        let none = Tensor::zeros((2, 0), DType::F64, device).unwrap();
        assert_eq!(replica.all_reduce(&none).unwrap().dims(), [2, 0]);
        assert_same(&mine, &numbers(replica.rank()).to_device(device).unwrap(), "the rank's own");
        assert!(sums.iter().all(|sum| sum.dims() == [3, 5] && sum.device().same_device(device)));
        replica.finish();
        sums.iter().map(f64s).collect::<Vec<_>>()
    });
    assert!(sums.iter().flatten().all(|sum| *sum == expected), "{sums:?}, expected {expected:?}");
}

/// The codebook that ranks on these devices learn of rows shared out to them, the same for all.
pub fn codebook_of_ranks(devices: &[Device]) -> Vec<f64> {
    let batches = batches(Metric::SquaredEuclidean, &Device::Cpu);
    let entries = uniform(&[2, 8, 3], 0.3, 1.0, DType::F64, &mut rng(39));
    let ema = Ema { decay: 0.6, threshold_ema_dead_code: 6.0, seed: 3, ..Ema::default() };
    let all = on_ranks(devices, |device, replica| {
        let start = Codebook::new(&entries.to_device(device).unwrap(), Metric::SquaredEuclidean).unwrap();
        let mut codebook = EmaCodebook::new(start, ema).unwrap().replicas(replica.clone()).unwrap();
        let (rank, count) = (replica.rank(), replica.count());
        let (first, end) = (ROWS * rank / count, ROWS * (rank + 1) / count);
        for (x, weights) in &batches {
            let own = |t: &Tensor| t.narrow(1, first, end - first).unwrap().to_device(device).unwrap();
            codebook.step_weighted(&own(x), &own(weights)).unwrap();
        }
        replica.finish();
        f64s(codebook.codebook().centroids())
    });
    assert!(all.iter().all(|entries| *entries == all[0]), "ranks drift apart");
    all[0].clone()
}

#[test]
fn ranks_add_up_in_their_order() {
    for device in devices() {
        for count in [1, 2, 5] {
            check_sums(&vec![device.clone(); count]);
        }
        let one = codebook_of_ranks(std::slice::from_ref(&device));
        for (a, b) in codebook_of_ranks(&vec![device.clone(); 3]).into_iter().zip(one) {
            assert!((a - b).abs() < 1e-12, "{a} of three, {b} of one");
        }
    }
    assert!(ReplicaRank::threads(&[]).unwrap().is_empty());
}

/// Who waits for a rank that has failed hears of it, and so does who calls later; one that has finished is no failure.
#[test]
fn a_rank_that_leaves_ends_the_others() {
    let cpus = vec![Device::Cpu; 3];
    for rounds in 0..3 {
        let errors = on_ranks(&cpus, |_, replica| {
            let mine = numbers(replica.rank());
            for round in 0..5 {
                if replica.rank() == 1 && round == rounds {
                    return None;
                }
                if let Err(error) = replica.all_reduce(&mine) {
                    assert_eq!(round, rounds);
                    assert!(replica.all_reduce(&mine).is_err());
                    return Some(error.to_string());
                }
            }
            panic!("nobody was missed")
        });
        assert_eq!(errors[1], None);
        for error in [&errors[0], &errors[2]] {
            let error = error.as_ref().unwrap();
            // The first to notice leaves as well.
            assert!(error.contains("of 3") && error.contains("it has left"), "{error}");
        }
    }
    let done = on_ranks(&cpus, |_, replica| {
        replica.all_reduce(&numbers(0)).unwrap();
        replica.finish();
    });
    assert_eq!(done.len(), 3);
    let wrong = on_ranks(&cpus, |_, replica| {
        let mine = Tensor::zeros(2 + replica.rank() / 2, DType::F64, &Device::Cpu).unwrap();
        replica.all_reduce(&mine.to_dtype(DType::F32).unwrap()).unwrap_err().to_string()
            + &replica.all_reduce(&mine).unwrap_err().to_string()
    });
    for wrong in wrong {
        assert!(wrong.contains("dtype F32, expected F64") && wrong.contains("shape ["), "{wrong}");
    }
}

/// What replicas have of the rows of a problem: uneven parts, one of them a single row.
const PARTS: [(usize, usize); 3] = [(0, 25), (25, 1), (26, 34)];
const ROWS: usize = 60;
const STEPS: usize = 5;

/// The part of a replica of `(.., ROWS)` or `(.., ROWS, d)`.
fn part(t: &Tensor, dim: usize, rank: usize) -> Tensor {
    t.narrow(dim, PARTS[rank].0, PARTS[rank].1).unwrap()
}

/// Rows of each step, `(2, ROWS, 3)`: the first step has rows that say nothing, and the last one has none of weight in one replica.
fn batches(metric: Metric, device: &Device) -> Vec<(Tensor, Tensor)> {
    let batch = |step: usize| {
        let x = uniform(&[2, ROWS, 3], 0.3, 1.0, DType::F64, &mut rng(40 + step as u64));
        let silent = if metric == Metric::Cosine { 0.0 } else { f64::NAN };
        let x = tensor(x.dims(), DType::F64, |i| if step == 0 && i / 3 % 7 == 0 { silent } else { f64s(&x)[i] });
        let last = |row: usize| step + 1 == STEPS && (26..60).contains(&row);
        let weights = tensor(&[2, ROWS], DType::F64, |i| if last(i % ROWS) { 0.0 } else { (i % 4) as f64 });
        (x.to_device(device).unwrap(), weights.to_device(device).unwrap())
    };
    (0..STEPS).map(batch).collect()
}

#[test]
fn codebooks_of_replicas_are_that_of_all_rows() {
    for device in devices() {
        for (metric, threshold) in [
            (Metric::SquaredEuclidean, 0.0),
            (Metric::SquaredEuclidean, 6.0),
            (Metric::Cosine, 0.0),
            (Metric::Cosine, 6.0),
        ] {
            let batches = batches(metric, &device);
            let entries = uniform(&[2, 8, 3], 0.3, 1.0, DType::F64, &mut rng(39)).to_device(&device).unwrap();
            let ema = Ema { decay: 0.6, threshold_ema_dead_code: threshold, seed: 3, ..Ema::default() };
            let start = EmaCodebook::new(Codebook::new(&entries, metric).unwrap(), ema).unwrap();

            let (mut one, mut revived) = (start.clone(), 0);
            let expected: Vec<_> = batches
                .iter()
                .map(|(x, weights)| {
                    let out = one.step_weighted(x, weights).unwrap();
                    revived += f64s(&one.cluster_size().unwrap()).iter().filter(|size| **size == threshold).count();
                    (out, one.codebook().centroids().copy().unwrap(), one.cluster_size().unwrap())
                })
                .collect();
            assert_eq!(revived > 3, threshold > 0.0, "{revived} revived");

            let replicas = on_replicas(PARTS.len(), |rank, replicas| {
                let mut codebook = start.clone().replicas(replicas).unwrap();
                let step = |(x, weights): &(Tensor, Tensor)| {
                    let out = codebook.step_weighted(&part(x, 1, rank), &part(weights, 1, rank)).unwrap();
                    (out, codebook.codebook().centroids().copy().unwrap(), codebook.cluster_size().unwrap())
                };
                batches.iter().map(step).collect::<Vec<_>>()
            });
            for (step, (all, entries, sizes)) in expected.iter().enumerate() {
                for (rank, replica) in replicas.iter().enumerate() {
                    let (out, own_entries, own_sizes) = &replica[step];
                    let what = format!("{metric:?}, threshold {threshold}, step {step}, replica {rank}");
                    assert_same(own_entries, &replicas[0][step].1, &what);
                    assert_same(own_sizes, &replicas[0][step].2, &what);
                    assert_near(own_entries, &f64s(entries), 1e-12, &what);
                    assert_near(own_sizes, &f64s(sizes), 1e-12, &what);
                    assert_same(&out.codes, &part(&all.codes, 1, rank).contiguous().unwrap(), &what);
                    assert_same(&out.usage.codes_used, &all.usage.codes_used, &what);
                    assert_near(&out.usage.perplexity, &f64s(&all.usage.perplexity), 1e-12, &what);
                }
            }
        }
    }
}

/// Every number here is a multiple of a small power of two, so that f64 holds all sums and the averages are those by hand.
#[test]
fn sums_of_replicas_are_those_by_hand() {
    for device in devices() {
        let column = |values: &[f32]| Tensor::new(values, &device).unwrap().unsqueeze(1).unwrap();
        let codebook = Codebook::new(&column(&[0.0, 8.0, 100.0]), Metric::SquaredEuclidean).unwrap();
        let start = EmaCodebook::new(codebook, Ema { decay: 0.5, eps: 0.0, ..Ema::default() }).unwrap();
        let rows = [column(&[1.0, 7.0, 2.0]), column(&[9.0])];
        let done = on_replicas(2, |rank, replicas| {
            let mut codebook = start.clone().replicas(replicas).unwrap();
            let out = codebook.step(&rows[rank]).unwrap();
            (f64s(codebook.codebook().centroids()), f64s(&codebook.cluster_size().unwrap()), f64s(&out.loss))
        });
        // Sizes are half of 1 and half of the new rows, 2, 2 and none; sums are (0 + 3) / 2, (8 + 16) / 2 and as they were.
        let (entries, sizes) = (vec![1.0, 8.0, 100.0], vec![1.5, 1.5, 0.5]);
        // A loss is of a replica's own rows: 1, 1 and 4 by three, and 1.
        assert_eq!(done[0], (entries.clone(), sizes.clone(), vec![2.0]));
        assert_eq!(done[1], (entries, sizes, vec![1.0]));
    }
}

#[test]
fn stages_of_replicas_are_those_of_all_rows() {
    for device in devices() {
        let x = uniform(&[ROWS, 3], 0.0, 1.0, DType::F32, &mut rng(45)).to_device(&device).unwrap();
        let ema = Ema { decay: 0.5, threshold_ema_dead_code: 2.0, ..Ema::default() };
        let start = EmaResidualQuantizer::train(&x, 3, &KMeans::new(6), ema).unwrap().quantize_dropout(2, 5).unwrap();
        let shared = EmaResidualQuantizer::shared(start.codebooks()[0].clone(), 3).unwrap();
        for (start, is_shared) in [(start, false), (shared, true)] {
            let mut one = start.clone();
            let expected: Vec<_> = (0..STEPS).map(|_| one.step(&x).unwrap()).collect();
            let replicas = on_replicas(PARTS.len(), |rank, replicas| {
                let mut quantizer = start.clone().replicas(replicas).unwrap();
                let codes: Vec<_> = (0..STEPS).map(|_| quantizer.step(&part(&x, 0, rank)).unwrap().codes).collect();
                (codes, quantizer)
            });
            for (rank, (codes, quantizer)) in replicas.iter().enumerate() {
                for (own, first) in quantizer.codebooks().iter().zip(replicas[0].1.codebooks()) {
                    assert_same(own.codebook().centroids(), first.codebook().centroids(), "replicas");
                }
                if is_shared {
                    // Rows come in the order of replicas, then of stages, and so dead entries draw others than in one process.
                    continue;
                }
                for (own, all) in codes.iter().zip(&expected) {
                    assert_same(own, &part(&all.codes, 0, rank).contiguous().unwrap(), "codes");
                }
                for (own, all) in quantizer.codebooks().iter().zip(one.codebooks()) {
                    // Rounded to f32 from averages that differ by the rounding of f64.
                    assert_near(own.codebook().centroids(), &f64s(all.codebook().centroids()), 1e-6, "entries");
                }
            }
        }
    }
}

#[derive(Clone, Copy)]
enum Wrong {
    Rank,
    Shape,
    DType,
    Failure,
}

impl Replicas for Wrong {
    fn rank(&self) -> usize {
        usize::from(matches!(self, Wrong::Rank)) * 2
    }

    fn count(&self) -> usize {
        2
    }

    fn all_reduce(&self, mine: &Tensor) -> candle_core::Result<Tensor> {
        match self {
            Wrong::Shape => mine.flatten_all(),
            Wrong::DType => mine.to_dtype(DType::F32),
            _ => candle_core::bail!("the other one is gone"),
        }
    }
}

#[test]
fn replicas_that_do_not_fit_are_refused_and_change_nothing() {
    let x = uniform(&[10, 2], 0.0, 1.0, DType::F32, &mut rng(46));
    let start = EmaCodebook::train(&x, &KMeans::new(4), Ema::default()).unwrap();
    let refused = |wrong: Wrong| -> Error {
        let mut codebook = match start.clone().replicas(Arc::new(wrong)) {
            Ok(codebook) => codebook,
            Err(error) => return error,
        };
        let error = codebook.step(&x).unwrap_err();
        assert_same(codebook.codebook().centroids(), start.codebook().centroids(), "entries");
        // What does not learn meets nobody.
        codebook.quantize(&x).unwrap();
        error
    };
    assert_eq!(refused(Wrong::Rank).to_string(), "rank: 2 is outside 0..=1");
    assert_eq!(refused(Wrong::Shape).to_string(), "all_reduce: shape [4], expected [1, 4]");
    assert_eq!(refused(Wrong::DType).to_string(), "all_reduce: dtype F32, expected F64");
    assert!(refused(Wrong::Failure).to_string().contains("the other one is gone"));
}
