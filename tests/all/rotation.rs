//! Product quantisers of rotated rows, and with one codebook for all pieces.

use crate::common::*;
use candle_core::{DType, Device, Module, Tensor};
use candle_flash_kmeans::{
    nn::{Codebook, ProductConfig, ProductQuantizer, Rotation},
    Error, KMeans,
};

/// Rows whose columns depend on each other, of very different variances.
fn mixed(shape: &[usize], seed: u64) -> Tensor {
    let d = shape[shape.len() - 1];
    let x = uniform(shape, 0.0, 1.0, DType::F64, &mut rng(seed));
    let scales = tensor(&[d], DType::F64, |i| 0.5f64.powi(i as i32));
    let mix = uniform(&[d, d], 0.0, 1.0, DType::F64, &mut rng(seed + 1));
    x.broadcast_mul(&scales).unwrap().broadcast_matmul(&mix).unwrap()
}

fn config(pieces: usize, rotation: Rotation, shared: bool) -> ProductConfig {
    ProductConfig { rotation, shared, ..ProductConfig::new(pieces) }
}

/// The matrix of a problem, row by row.
fn matrix(pq: &ProductQuantizer, problem: usize) -> Rows {
    let all = problems(pq.rotation().unwrap());
    all[if all.len() == 1 { 0 } else { problem }].clone()
}

fn assert_orthogonal(r: &Rows) {
    for i in 0..r.len() {
        for j in 0..r.len() {
            let product = sum(r.iter().map(|row| row[i] * row[j]));
            assert!((product - f64::from(i == j)).abs() < 1e-5, "{i} {j}: {product}");
        }
    }
}

#[test]
fn rows_are_rotated_before_they_are_cut() {
    for device in devices() {
        let x = mixed(&[2, 80, 6], 1).to_device(&device).unwrap();
        let kmeans = KMeans::new(4);
        let none = ProductQuantizer::train_with(&x, &ProductConfig::new(3), &kmeans).unwrap();
        let plain = ProductQuantizer::train(&x, 3, &kmeans).unwrap();
        assert!(none.rotation().is_none());
        assert_same(none.codebook().centroids(), plain.codebook().centroids(), "no rotation");
        let random =
            ProductQuantizer::train_with(&x, &config(3, Rotation::Random { seed: 1 }, false), &kmeans).unwrap();
        assert_orthogonal(&matrix(&random, 0));
        let other = ProductQuantizer::train_with(&x, &config(3, Rotation::Random { seed: 2 }, false), &kmeans).unwrap();
        assert_ne!(matrix(&random, 0), matrix(&other, 0));

        // Given is what random is, and what is done by hand.
        let r = random.rotation().unwrap();
        let given = ProductQuantizer::train_with(&x, &config(3, Rotation::Given(r.clone()), false), &kmeans).unwrap();
        assert_same(given.codebook().centroids(), random.codebook().centroids(), "given");
        let turned = x.broadcast_matmul(r).unwrap();
        let by_hand = ProductQuantizer::train(&turned, 3, &kmeans).unwrap();
        assert_near(given.codebook().centroids(), &f64s(by_hand.codebook().centroids()), 1e-12, "centroids");
        let codes = given.encode_u8(&x).unwrap();
        assert_same(&codes, &by_hand.encode_u8(&turned).unwrap(), "codes");
        let back = by_hand.decode(&codes).unwrap().broadcast_matmul(&r.t().unwrap().contiguous().unwrap()).unwrap();
        assert_near(&given.decode(&codes).unwrap(), &f64s(&back), 1e-12, "decoded");
        assert_near(&given.forward(&x).unwrap(), &f64s(&back), 1e-12, "the layer");
        assert_near(&given.join(&given.split(&x).unwrap()).unwrap(), &f64s(&x), 1e-12, "there and back");
        // Rows of any batch go through one matrix.
        let shared =
            ProductQuantizer::train_with(&x.get(0).unwrap(), &config(3, Rotation::Pca, false), &kmeans).unwrap();
        assert_eq!(shared.encode(&x).unwrap().dims(), [2, 80, 3]);
        assert_same(&shared.encode(&x).unwrap().get(1).unwrap(), &shared.encode(&x.get(1).unwrap()).unwrap(), "batch");
    }
}

#[test]
fn principal_components_are_dealt_to_pieces() {
    for device in devices() {
        for (m, dtype) in [(2, DType::F64), (3, DType::F32), (6, DType::F64), (1, DType::F64)] {
            let mut x = mixed(&[2, 200, 6], 3);
            // A row that is not finite and rows of no weight count for nothing.
            let nan = tensor(&[2, 200, 6], DType::F64, |i| if i == 7 { f64::NAN } else { 0.0 });
            x = (x + nan).unwrap().to_dtype(dtype).unwrap();
            let weights = tensor(&[200], DType::F64, |i| (i % 3) as f64);
            let (x, rows) = (x.to_device(&device).unwrap(), problems(&x));
            let kmeans = KMeans::new(4).check_finite(false).sample_weights(&weights.to_device(&device).unwrap());
            let pq = ProductQuantizer::train_with(&x, &config(m, Rotation::Pca, false), &kmeans).unwrap();
            for (b, rows) in rows.iter().enumerate() {
                let weight = |i: usize| if rows[i].iter().all(|v| v.is_finite()) { (i % 3) as f64 } else { 0.0 };
                let of = |f: &dyn Fn(&[f64]) -> f64| {
                    let counted = (0..200).filter(|&i| weight(i) > 0.0);
                    sum(counted.clone().map(|i| weight(i) * f(&rows[i]))) / sum(counted.map(weight))
                };
                let means: Vec<_> = (0..6).map(|c| of(&|row| row[c])).collect();
                let covariance = |a: usize, c: usize| of(&|row| (row[a] - means[a]) * (row[c] - means[c]));
                let r = matrix(&pq, b);
                assert_orthogonal(&r);
                let along = |i: usize, j: usize| {
                    sum((0..6)
                        .flat_map(|a| (0..6).map(move |c| (a, c)))
                        .map(|(a, c)| r[a][i] * covariance(a, c) * r[c][j]))
                };
                let most = along(0, 0);
                let mut last = f64::INFINITY;
                for place in 0..6 {
                    let column = place % m * (6 / m) + place / m;
                    assert!(along(column, column) <= last + 1e-6 * most, "{m} pieces: {place} is not the next");
                    last = along(column, column);
                    for other in (0..6).filter(|&other| other != column) {
                        assert!(along(column, other).abs() < 1e-6 * most, "{m} pieces: {column} and {other}");
                    }
                }
            }
        }
    }
}

#[test]
fn a_rotation_loses_less_of_rows_whose_columns_differ() {
    let x = mixed(&[600, 8], 5);
    let error = |rotation| {
        let pq = ProductQuantizer::train_with(&x, &config(4, rotation, false), &KMeans::new(8)).unwrap();
        f64s(&(pq.forward(&x).unwrap() - &x).unwrap().sqr().unwrap().sum_all().unwrap())[0]
    };
    let (none, pca) = (error(Rotation::None), error(Rotation::Pca));
    assert!(pca < 0.7 * none, "{pca} and {none}");
}

#[test]
fn pieces_may_share_a_codebook() {
    let folder = Folder::new("rotation");
    for device in devices() {
        let x = mixed(&[2, 60, 6], 7).to_device(&device).unwrap();
        let weights = tensor(&[60], DType::F64, |i| 1.0 + (i % 4) as f64).to_device(&device).unwrap();
        for weighted in [false, true] {
            let settings = KMeans::new(5);
            let settings = if weighted { settings.sample_weights(&weights) } else { settings };
            let pq = ProductQuantizer::train_with(&x, &config(3, Rotation::None, true), &settings).unwrap();
            let pieces = x.reshape((2, 60, 3, 2)).unwrap().transpose(1, 2).unwrap().contiguous().unwrap();
            let mut one = KMeans::new(5);
            if weighted {
                one = one.sample_weights(&Tensor::cat(&[&weights, &weights, &weights], 0).unwrap());
            }
            let one = Codebook::train(&pieces.reshape((2, 180, 2)).unwrap(), &one).unwrap();
            // It is there once, and each piece has the codes and values that it has by the codebook alone.
            assert_same(pq.codebook().centroids(), &one.centroids().unsqueeze(1).unwrap(), "of all pieces");
            assert!(pq.is_shared());
            assert_eq!((pq.m(), pq.d()), (3, 6));
            let codes = pq.encode(&x).unwrap();
            for piece in 0..3 {
                let own = pieces.narrow(1, piece, 1).unwrap().squeeze(1).unwrap().contiguous().unwrap();
                let of = |t: &Tensor, width| t.narrow(2, piece * width, width).unwrap();
                assert_same(&of(&codes, 1).squeeze(2).unwrap(), &one.encode(&own).unwrap(), "codes of a piece");
                assert_same(&of(&pq.decode(&codes).unwrap(), 2), &one.forward(&own).unwrap(), "values of a piece");
                assert_same(&of(&pq.forward(&x).unwrap(), 2), &one.forward(&own).unwrap(), "the layer's");
            }
            assert_eq!(pq.bits_per_value_with_codebook(60), 1.5 + (5.0 * 2.0 * 64.0) / (60.0 * 6.0));
        }
        for (rotation, shared) in [(Rotation::Pca, true), (Rotation::Random { seed: 4 }, false), (Rotation::Pca, false)]
        {
            for dtype in DTYPES {
                let x = x.to_dtype(dtype).unwrap();
                let pq =
                    ProductQuantizer::train_with(&x, &config(2, rotation.clone(), shared), &KMeans::new(4)).unwrap();
                let path = folder.0.join("pq.safetensors");
                pq.save(&path).unwrap();
                let loaded = ProductQuantizer::load(&path, &device).unwrap();
                assert_eq!((loaded.is_shared(), loaded.m()), (shared, 2));
                let stored = if shared { 1 } else { 2 } * 2 * 4 * 3;
                assert_eq!(loaded.codebook().centroids().elem_count(), stored, "entries");
                let codes = pq.encode(&x).unwrap();
                assert_same(&loaded.encode(&x).unwrap(), &codes, "codes");
                if shared {
                    let bytes = std::fs::read(&path).unwrap();
                    let (setting, damaged) = (br#""pieces":"2""#, br#""pieces":"0""#);
                    let at = bytes.windows(setting.len()).position(|text| text == setting).unwrap();
                    let none = [&bytes[..at], damaged, &bytes[at + setting.len()..]].concat();
                    std::fs::write(&path, none).unwrap();
                    let error = ProductQuantizer::load(&path, &device).unwrap_err();
                    assert!(matches!(error, Error::Format { .. }), "{error}");
                }
                let decoded = pq.decode(&codes).unwrap();
                assert_same(&loaded.decode(&codes).unwrap(), &decoded, "decoded");
                assert_eq!(decoded.dtype(), dtype);
                let wide = pq.to_dtype(DType::F64).unwrap().decode(&codes).unwrap();
                let most = largest(f64s(&wide).iter().map(|v| v.abs()));
                assert_near(&decoded, &f64s(&wide), 4.0 * ulp(most, dtype).max(1e-6), "in f64");
            }
        }
    }
}

#[test]
fn a_shared_codebook_serves_rows_of_any_batch() {
    for device in devices() {
        let x = mixed(&[2, 30, 6], 9).to_device(&device).unwrap();
        let first = x.get(0).unwrap();
        let pq = ProductQuantizer::train_with(&first, &config(3, Rotation::Random { seed: 1 }, true), &KMeans::new(4))
            .unwrap();
        assert_eq!(pq.codebook().centroids().dims(), [1, 4, 2]);
        let codes = pq.encode(&x).unwrap();
        assert_eq!(codes.dims(), [2, 30, 3]);
        for b in 0..2 {
            let rows = x.get(b).unwrap();
            assert_same(&codes.get(b).unwrap(), &pq.encode(&rows).unwrap(), "codes");
            let alone = pq.decode(&codes.get(b).unwrap()).unwrap();
            assert_same(&pq.decode(&codes).unwrap().get(b).unwrap(), &alone, "decoded");
            assert_same(&pq.forward(&x).unwrap().get(b).unwrap(), &alone, "the layer");
        }
        let none = first.narrow(0, 0, 0).unwrap();
        assert_eq!(pq.encode(&none).unwrap().dims(), [0, 3]);
        assert_eq!(pq.decode(&pq.encode(&none).unwrap()).unwrap().dims(), [0, 6]);
    }
}

#[test]
fn what_is_no_rotation_is_refused() {
    let x = ones(&[2, 9, 4], DType::F32, &Device::Cpu);
    let train = |config, kmeans: &KMeans| ProductQuantizer::train_with(&x, &config, kmeans).map(|_| ());
    let given = |t: Tensor| train(config(2, Rotation::Given(t), false), &KMeans::new(2)).unwrap_err().to_string();
    let eye = Tensor::eye(4, DType::F32, &Device::Cpu).unwrap();
    assert_eq!(given(eye.narrow(0, 0, 3).unwrap()), "rotation: shape [3, 4], expected [4, 4]");
    let three = eye.unsqueeze(0).unwrap().repeat((3, 1, 1)).unwrap();
    assert_eq!(given(three), "rotation: shape [3, 4, 4], expected [2, 4, 4]");
    assert!(given((&eye * 2.0).unwrap()).starts_with("rotation: 3 is not within 0.001"));
    let lengths = KMeans::new(2).lengths(&Tensor::new(&[4u32, 5], &Device::Cpu).unwrap());
    let error = train(config(2, Rotation::None, true), &lengths).unwrap_err();
    assert!(matches!(error, Error::Conflict { argument: "lengths", .. }), "{error}");
    // Finite rows whose coordinates are beyond their dtype.
    let large = (x.narrow(0, 0, 1).unwrap() * 60_000.0).unwrap().to_dtype(DType::F16).unwrap();
    let error = ProductQuantizer::train_with(&large, &config(2, Rotation::Pca, false), &KMeans::new(2)).unwrap_err();
    let says = "rotation: a matrix cannot be combined with row 0 of batch element 0, which it takes beyond F16";
    assert_eq!(error.to_string(), says);
    let error = train(config(3, Rotation::Pca, false), &KMeans::new(2)).unwrap_err();
    assert!(matches!(error, Error::Conflict { argument: "m", .. }), "{error}");
}
