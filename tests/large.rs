//! Sizes past 32 bits, on a GPU with 80 GB or more: `FLASH_KMEANS_TEST_DEVICE=cuda cargo test --release --features cuda
//! --test large -- --ignored --test-threads 1`. Rows are drawn from the result and compared with the specification.

mod common;

use anyhow::Result;
use candle_core::{DType, Device, Tensor};
use candle_flash_kmeans::{assign, cluster_means, residuals, sort_by_cluster, Error, Init, KMeans, Metric};
use common::*;
use rand::Rng;

fn gpu() -> Device {
    devices().pop().filter(|d| !d.is_cpu()).expect("these sizes need FLASH_KMEANS_TEST_DEVICE=cuda")
}

/// `n` rows that repeat after 65,521, a prime: an index cut to 32 bits lands on another row. Joined on the
/// device, because the host could not hold them.
fn rows(n: usize, d: usize, dtype: DType, device: &Device) -> Result<Tensor> {
    let period = 65_521;
    let pattern = uniform(&[period, d], 0.0, 1.0, dtype, &mut rng(1)).to_device(device)?;
    let mut parts = vec![pattern; n / period];
    if !n.is_multiple_of(period) {
        parts.push(uniform(&[period, d], 0.0, 1.0, dtype, &mut rng(1)).narrow(0, 0, n % period)?.to_device(device)?);
    }
    Ok(Tensor::cat(&parts, 0)?)
}

/// Rows at both ends, at every power of two of elements, and at random.
fn sample(n: usize, d: usize) -> Vec<usize> {
    let mut rng = rng(2);
    let edges = (28..36).flat_map(|p| [(1usize << p) / d, (1 << p) / d + 1, ((1 << p) / d).saturating_sub(1)]);
    let random: Vec<usize> = (0..2000).map(|_| rng.random_range(0..n)).collect();
    edges.chain([0, 1, n - 2, n - 1]).chain(random).filter(|&i| i < n).collect()
}

/// Entries `at` of dim 0, copied: to read a view, Candle brings all that it views to the host.
fn some(t: &Tensor, at: &[usize]) -> Result<Tensor> {
    let parts: Vec<Tensor> = at.iter().map(|&i| t.narrow(0, i, 1)?.force_contiguous()).collect::<Result<_, _>>()?;
    Ok(Tensor::cat(&parts, 0)?)
}

fn check(x: &Tensor, c: &Tensor, labels: &Tensor) -> Result<()> {
    let (n, d) = x.dims2()?;
    for piece in sample(n, d).chunks(64) {
        let want = spec_labels(&some(x, piece)?, c, Metric::SquaredEuclidean);
        assert_eq!(u32s(&some(labels, piece)?), want, "rows {piece:?}");
    }
    Ok(())
}

#[test]
#[ignore = "needs a GPU with 80 GB"]
fn elements_past_32_bits() -> Result<()> {
    let device = gpu();
    for (n, d, k, dtype) in
        [((1 << 26) + 3, 65, 7, DType::F16), ((1 << 24) + 1, 257, 5, DType::F32), ((1 << 31) + 7, 2, 3, DType::F16)]
    {
        let (x, c) = (rows(n, d, dtype, &device)?, uniform(&[k, d], 0.0, 1.0, dtype, &mut rng(3)).to_device(&device)?);
        let labels = assign(&x, &c, Metric::SquaredEuclidean)?;
        check(&x, &c, &labels)?;
        let (order, offsets) = sort_by_cluster(&labels, k)?;
        assert_eq!(u32s(&offsets)[k] as usize, n);
        let ends: Vec<usize> = u32s(&some(&order, &[0, n - 1])?).iter().map(|&i| i as usize).collect();
        let of_ends = u32s(&some(&labels, &ends)?);
        assert!(of_ends[0] == 0 && of_ends[1] == k as u32 - 1, "{of_ends:?}");
        assert!(f64s(&cluster_means(&x, &labels, k)?).iter().all(|v| v.abs() <= 1.0));
    }
    Ok(())
}

/// Layouts that have to be copied: Candle's own copy ends at 2^32 elements, and wraps the steps of a smaller view.
#[test]
#[ignore = "needs a GPU with 80 GB"]
fn layouts_past_32_bits() -> Result<()> {
    let device = gpu();
    let (n, d, k) = ((1usize << 25) + 8, 128, 5);
    let pattern = f64s(&uniform(&[65_521, 1], 0.0, 1.0, DType::F16, &mut rng(1)));
    let x = rows(d * n, 1, DType::F16, &device)?.reshape((d, n))?.t()?;
    let on_host = |at: &[usize]| {
        let values = at.iter().flat_map(|&i| (0..d).map(move |j| j * n + i)).map(|at| pattern[at % 65_521]).collect();
        Tensor::from_vec(values, (at.len(), d), &Device::Cpu)?.to_dtype(DType::F16)
    };
    let c = uniform(&[k, d], 0.0, 1.0, DType::F16, &mut rng(3));
    let on_device = c.to_device(&device)?;
    let labels = assign(&x, &on_device, Metric::SquaredEuclidean)?;
    for piece in sample(n, d).chunks(64) {
        let want = spec_labels(&on_host(piece)?, &c, Metric::SquaredEuclidean);
        assert_eq!(u32s(&some(&labels, piece)?), want, "rows {piece:?}");
    }
    // Few rows, far apart in each column.
    let (few, at) = (x.narrow(0, n - 9, 9)?, (n - 9..n).collect::<Vec<_>>());
    assert_eq!(
        u32s(&assign(&few, &on_device, Metric::SquaredEuclidean)?),
        spec_labels(&on_host(&at)?, &c, Metric::SquaredEuclidean)
    );
    // A fit, whose rows go to memory of its own.
    let settings = KMeans::new(k).init(Init::Given(on_device)).max_iters(2).check_finite(false);
    let mut prepared = settings.prepare((n, d), DType::F16, &device)?;
    prepared.run(&x)?;
    let centroids = prepared.centroids().to_device(&Device::Cpu)?;
    for piece in sample(n, d).chunks(64) {
        let want = spec_labels(&on_host(piece)?, &centroids, Metric::SquaredEuclidean);
        assert_eq!(u32s(&some(prepared.labels(), piece)?), want, "rows {piece:?}");
    }
    Ok(())
}

/// Candle's ops end, too, and reach the last element.
#[test]
#[ignore = "needs a GPU with 80 GB"]
fn elementwise_past_32_bits() -> Result<()> {
    let device = gpu();
    // A label out of range at the end of more than 2^32.
    let (b, n) = (3, (1usize << 32) / 3 + 12_345);
    let labels = Tensor::zeros((b, n), DType::U32, &device)?;
    labels.flatten_all()?.slice_set(&Tensor::new(&[7u32], &device)?, 0, b * n - 1)?;
    let refused = sort_by_cluster(&labels, 7);
    assert!(matches!(refused, Err(Error::Range { argument: "labels", got: 7, .. })), "{refused:?}");
    drop(labels);

    let (n, d, k) = ((1 << 25) + 77, 128, 3);
    let (x, c) = (rows(n, d, DType::F16, &device)?, uniform(&[k, d], 0.0, 1.0, DType::F16, &mut rng(3)));
    let c = c.to_device(&device)?;
    let labels = assign(&x, &c, Metric::SquaredEuclidean)?;
    let left = residuals(&x, &c, &labels)?;
    let at = sample(n, d);
    let own = c.index_select(&some(&labels, &at)?, 0)?;
    assert_same(&some(&left, &at)?, &(some(&x, &at)? - own)?, "residuals");
    drop(left);

    // Factors of the rows of a cosine fit, a column each.
    let (b, n) = (70_000, 32_000);
    let x = rows(b * n, 1, DType::F16, &device)?.reshape((b, n, 1))?;
    let fit = KMeans::new(2).metric(Metric::Cosine).init(Init::Even).max_iters(1).fit(&x)?;
    let last = x.narrow(0, b - 1, 1)?.force_contiguous()?;
    let want = KMeans::new(2).metric(Metric::Cosine).init(Init::Even).max_iters(1).fit(&last)?;
    assert_same(
        &fit.centroids.narrow(0, b - 1, 1)?.force_contiguous()?,
        &want.centroids,
        "the last problem's centroids",
    );
    assert_same(&fit.labels.narrow(0, b - 1, 1)?.force_contiguous()?, &want.labels, "the last problem's labels");
    Ok(())
}

#[test]
#[ignore = "needs a GPU with 80 GB"]
fn scores_past_32_bits() -> Result<()> {
    let device = gpu();
    for (n, d, k) in [(70_001, 16, 65_537), (1 << 20, 4, (1 << 14) + 1), (3, 2, (1 << 30) + 5)] {
        let c = rows(k, d, DType::F16, &device)?;
        let x = uniform(&[n, d], 0.0, 1.0, DType::F16, &mut rng(4)).to_device(&device)?;
        let labels = assign(&x, &c, Metric::SquaredEuclidean)?;
        // So many centroids take the specification a second a row: few rows, and of the pattern's repeats the first.
        let (rows, first) = ([0, n / 2, n - 1], c.narrow(0, 0, k.min(65_521))?.force_contiguous()?);
        let want = spec_labels(&some(&x, &rows)?, &first, Metric::SquaredEuclidean);
        assert_eq!(u32s(&some(&labels, &rows)?), want, "{n} {d} {k}");
    }
    Ok(())
}

#[test]
#[ignore = "needs a GPU with 80 GB"]
fn a_last_centroid_past_32_bits_wins() -> Result<()> {
    let device = gpu();
    let (k, d) = ((1usize << 26) + 3, 64);
    let c = rows(k - 1, d, DType::F16, &device)?;
    let x = (Tensor::ones((5, d), DType::F16, &device)? * 3.0)?;
    let c = Tensor::cat(&[&c, &x.narrow(0, 0, 1)?], 0)?;
    assert_eq!(u32s(&assign(&x, &c, Metric::SquaredEuclidean)?), vec![k as u32 - 1; 5]);
    Ok(())
}
