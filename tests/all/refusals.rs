//! Every refusal is typed and names the argument and both values.

use crate::common::*;
use candle_core::{DType, Device, Tensor};
use candle_flash_kmeans::{
    assign, cluster_means, cluster_sizes, cluster_sums, inverse_order, quantize, residuals, sort_by_cluster,
    EmptyClusters, Error, Init, KMeans, Metric,
};
use std::fmt::Debug;

/// The call fails, and the message holds every part.
#[track_caller]
fn refused<T: Debug>(result: Result<T, Error>, variant: &str, parts: &[&str]) {
    let error = result.unwrap_err();
    let (name, text) = (format!("{error:?}"), error.to_string());
    assert!(name.starts_with(variant), "{name} is no {variant}");
    parts.iter().for_each(|p| assert!(text.contains(p), "{text:?} lacks {p:?}"));
    // The same through Candle's error, as a model's forward would return it.
    assert!(candle_core::Error::from(error).to_string().contains(parts[0]));
}

#[test]
fn of_fit() {
    for device in devices() {
        let x = ones(&[6, 3], DType::F32, &device);
        let f32s = |shape: &[usize]| ones(shape, DType::F32, &device);
        refused(KMeans::new(0).fit(&x), "Range", &["k: 0", "1..=6"]);
        refused(KMeans::new(7).fit(&x), "Range", &["k: 7", "1..=6"]);
        refused(KMeans::new(1).fit(&f32s(&[0, 3])), "Range", &["k: 1"]);
        refused(KMeans::new(1).fit(&f32s(&[3, 0])), "Range", &["x columns: 0"]);
        refused(KMeans::new(1).fit(&f32s(&[0, 3, 3])), "Range", &["x batch: 0"]);
        refused(KMeans::new(1).fit(&f32s(&[3])), "Rank", &["x", "2", "[3]"]);
        refused(KMeans::new(1).fit(&Tensor::new(1f32, &device).unwrap()), "Rank", &["x", "2", "[]"]);
        for dtype in [DType::U8, DType::U32, DType::I64] {
            refused(
                KMeans::new(1).fit(&ones(&[3, 3], dtype, &device)),
                "DType",
                &["x", &format!("{dtype:?}"), "F16, BF16, F32 or F64"],
            );
        }
        refused(KMeans::new(2).n_init(0).fit(&x), "Range", &["n_init: 0", "1.."]);
        for tol in [-1.0, f64::NAN, f64::INFINITY] {
            refused(KMeans::new(2).tol(tol).fit(&x), "Value", &["tol", &tol.to_string(), "at least 0"]);
        }
        let given = |c: Tensor| KMeans::new(2).init(Init::Given(c));
        refused(given(f32s(&[3, 3])).fit(&x), "Size", &["init", "3", "2"]);
        refused(given(f32s(&[2, 4])).fit(&x), "Size", &["centroids", "4", "3"]);
        refused(given(f32s(&[3])).fit(&x), "Rank", &["centroids", "[3]"]);
        refused(given(f32s(&[5, 2, 3])).fit(&x), "Shape", &["centroids", "[5, 2, 3]", "[2, 3]"]);
        refused(given(ones(&[2, 3], DType::F16, &device)).fit(&x), "DType", &["centroids", "F16", "F32"]);
        refused(given(f32s(&[2, 3])).n_init(3).fit(&x), "Conflict", &["n_init", "3", "given centroids"]);
        refused(KMeans::new(2).init(Init::Even).n_init(3).fit(&x), "Conflict", &["n_init", "3", "evenly spaced rows"]);
        let weighted = |w: Tensor| KMeans::new(2).sample_weights(&w);
        refused(weighted(f32s(&[5])).fit(&x), "Shape", &["sample_weights", "[5]", "[6]"]);
        refused(weighted(f32s(&[2, 6])).fit(&x), "Shape", &["sample_weights", "[2, 6]", "[6]"]);
        refused(weighted(ones(&[6], DType::U32, &device)).fit(&x), "DType", &["sample_weights", "U32", "float"]);
        let bad = |v: f32| Tensor::new(&[1f32, 1., v, 1., 1., 1.], &device).unwrap();
        refused(weighted(bad(-0.5)).fit(&x), "Value", &["sample_weights", "-0.5", "at least 0"]);
        refused(weighted(bad(f32::NAN)).fit(&x), "NonFinite", &["sample_weights", "row 2", "batch element 0"]);
        refused(
            weighted(f32s(&[6]).zeros_like().unwrap()).fit(&x),
            "Value",
            &["sample_weights total", "0", "positive"],
        );
        refused(KMeans::new(7).plan(&x), "Range", &["k: 7", "1..=6"]);
        refused(KMeans::new(2).tol(-1.0).plan(&x), "Value", &["tol", "-1"]);
        refused(weighted(f32s(&[5])).plan(&x), "Shape", &["sample_weights", "[5]", "[6]"]);
        refused(given(f32s(&[2, 4])).plan(&x), "Size", &["centroids", "4", "3"]);
        // Settings are refused before values are looked at, and values of settings before those of rows.
        let nan = x.affine(f64::NAN, 0.0).unwrap();
        refused(weighted(bad(-0.5)).tol(f64::NAN).fit(&nan), "Value", &["tol"]);
        refused(weighted(bad(-0.5)).fit(&nan), "Value", &["sample_weights", "-0.5"]);
        KMeans::new(2).empty_clusters(EmptyClusters::Relocate).fit(&x).unwrap();
    }
}

#[test]
fn of_values() {
    for device in devices() {
        for (dtype, v) in DTYPES.into_iter().flat_map(|t| [f64::NAN, f64::INFINITY, f64::NEG_INFINITY].map(|v| (t, v)))
        {
            for (at, batch, row) in [(0, 0, 0), (599, 1, 99), (137, 0, 45), (302, 1, 0)] {
                let mut values = vec![0.5; 600];
                values[at] = v;
                let y = Tensor::from_vec(values, (2, 100, 3), &Device::Cpu)
                    .unwrap()
                    .to_dtype(dtype)
                    .unwrap()
                    .to_device(&device)
                    .unwrap();
                let parts = [format!("row {row}"), format!("batch element {batch}")];
                refused(KMeans::new(2).fit(&y), "NonFinite", &["x", &parts[0], &parts[1]]);
                let x = ones(&[2, 100, 3], dtype, &device);
                let model = KMeans::new(2).fit(&x).unwrap();
                refused(model.predict(&y), "NonFinite", &["x", &parts[0], &parts[1]]);
                refused(model.transform(&y), "NonFinite", &["x", &parts[0], &parts[1]]);
                refused(
                    KMeans::new(100).init(Init::Given(y.clone())).fit(&x),
                    "NonFinite",
                    &["init", &parts[0], &parts[1]],
                );
                // Not checked, not refused: centroids stay finite.
                let fit = KMeans::new(2)
                    .check_finite(false)
                    .init(Init::Given(x.narrow(1, 0, 2).unwrap()))
                    .max_iters(3)
                    .fit(&y)
                    .unwrap();
                assert!(f64s(&fit.centroids).iter().all(|v| v.is_finite()) && u32s(&fit.labels).iter().all(|&l| l < 2));
            }
        }
    }
}

/// Of many bad rows the first one is named, and of many problems the first one's.
#[test]
fn of_the_first_value() {
    for device in devices() {
        for (bad, batch, row) in
            [(vec![300, 301, 900], 0, 300), (vec![999, 0], 0, 0), (vec![1999, 1256, 1255, 1900], 1, 255)]
        {
            let v = |i: usize| if bad.contains(&(i / 3)) && i % 3 == 2 { f64::NAN } else { 1.0 };
            let x = tensor(&[2, 1000, 3], DType::F32, v).to_device(&device).unwrap();
            refused(KMeans::new(2).fit(&x), "NonFinite", &["x", &format!("row {row} of batch element {batch} ")]);
        }
    }
}

#[test]
fn of_ops() {
    for device in devices() {
        let f32s = |shape: &[usize]| ones(shape, DType::F32, &device);
        let x = f32s(&[2, 6, 3]);
        let m = Metric::SquaredEuclidean;
        refused(assign(&x, &f32s(&[4, 2]), m), "Size", &["centroids", "2", "3"]);
        refused(assign(&x, &f32s(&[3, 4, 3]), m), "Shape", &["centroids", "[3, 4, 3]", "[2, 4, 3]"]);
        refused(assign(&x, &f32s(&[0, 3]), m), "Range", &["k: 0"]);
        refused(assign(&f32s(&[3]), &f32s(&[4, 3]), m), "Rank", &["x", "[3]"]);
        refused(quantize(&x, &ones(&[4, 3], DType::F64, &device), m), "DType", &["centroids", "F64", "F32"]);
        let labels = |v: &[u32]| Tensor::new(v, &device).unwrap();
        refused(sort_by_cluster(&labels(&[0, 4, 1]), 4), "Range", &["labels: 4", "0..=3"]);
        refused(sort_by_cluster(&labels(&[0]), 0), "Range", &["k: 0"]);
        refused(sort_by_cluster(&f32s(&[3]), 4), "DType", &["labels", "F32", "U32"]);
        refused(sort_by_cluster(&Tensor::new(1u32, &device).unwrap(), 4), "Rank", &["labels", "[]"]);
        let y = f32s(&[3, 2]);
        refused(cluster_means(&y, &labels(&[0, 1]), 2), "Shape", &["labels", "[2]", "[3]"]);
        refused(cluster_means(&y, &labels(&[0, 1, 2]), 2), "Range", &["labels: 2", "0..=1"]);
        refused(cluster_means(&ones(&[3, 2], DType::U8, &device), &labels(&[0, 1, 1]), 2), "DType", &["x", "U8"]);
        refused(cluster_means(&f32s(&[3]), &labels(&[0, 1, 1]), 2), "Rank", &["x", "[3]"]);
        refused(cluster_means(&f32s(&[3, 0]), &labels(&[0, 1, 1]), 2), "Range", &["x columns: 0"]);
        refused(cluster_sums(&y, &labels(&[0, 1]), 2), "Shape", &["labels", "[2]", "[3]"]);
        refused(cluster_sums(&y, &labels(&[0, 1, 2]), 2), "Range", &["labels: 2", "0..=1"]);
        refused(cluster_sizes(&labels(&[0, 4, 1]), 4), "Range", &["labels: 4", "0..=3"]);
        refused(cluster_sizes(&labels(&[0]), 0), "Range", &["k: 0"]);
        refused(inverse_order(&y), "DType", &["order", "F32", "U32"]);
        refused(inverse_order(&Tensor::new(1u32, &device).unwrap()), "Rank", &["order", "[]"]);
        refused(residuals(&y, &f32s(&[4, 3]), &labels(&[0, 1, 1])), "Size", &["centroids", "3", "2"]);
        refused(residuals(&y, &f32s(&[4, 2]), &labels(&[0, 1])), "Shape", &["labels", "[2]", "[3]"]);
        refused(residuals(&y, &f32s(&[4, 2]), &labels(&[0, 4, 1])), "Range", &["labels: 4", "0..=3"]);
        let model = KMeans::new(2).fit(&f32s(&[6, 3])).unwrap();
        refused(model.predict(&f32s(&[6, 4])), "Size", &["x: ", "centroids", "3", "4"]);
        refused(model.transform(&ones(&[6, 3], DType::BF16, &device)), "DType", &["x: ", "centroids", "F32", "BF16"]);
        refused(model.predict(&f32s(&[0, 3, 3, 4])), "Size", &["x: ", "4", "expected 3"]);
        if !device.is_cpu() {
            let (here, there) = (ones(&[6, 3], DType::F32, &Device::Cpu), f32s(&[6, 3]));
            refused(assign(&there, &here, m), "Device", &["centroids", "Cpu", "Cuda"]);
            refused(
                KMeans::new(1).sample_weights(&ones(&[6], DType::F32, &Device::Cpu)).fit(&there),
                "Device",
                &["sample_weights", "Cpu", "Cuda"],
            );
        }
    }
}

/// More rows than a u32 counts, without the memory for them.
#[test]
fn of_sizes() {
    let x = ones(&[1, 1], DType::F32, &Device::Cpu).broadcast_as((5_000_000_000, 1)).unwrap();
    refused(KMeans::new(2).fit(&x), "TooLarge", &["x rows", "5000000000", "4294967295"]);
    refused(assign(&x, &ones(&[2, 1], DType::F32, &Device::Cpu), Metric::Dot), "TooLarge", &["x rows", "5000000000"]);
    let label = Tensor::zeros(1, DType::U32, &Device::Cpu).unwrap();
    let labels = label.broadcast_as(5_000_000_000).unwrap();
    refused(sort_by_cluster(&labels, 2), "TooLarge", &["labels", "5000000000", "4294967295"]);
    let labels = label.broadcast_as((1 << 40, 1 << 22, 1)).unwrap();
    refused(cluster_sizes(&labels, 2), "TooLarge", &["labels"]);
    // Rows and centroids that fit, and distances between them that do not.
    let model = KMeans::new(2).fit(&ones(&[4, 1], DType::F32, &Device::Cpu)).unwrap();
    let mut model = model.clone();
    model.centroids = model.centroids.narrow(0, 0, 1).unwrap().broadcast_as((1 << 31, 1)).unwrap();
    let x = ones(&[1, 1, 1], DType::F32, &Device::Cpu).broadcast_as((1 << 10, 1 << 31, 1)).unwrap();
    refused(model.transform(&x), "TooLarge", &["x rows times centroids"]);
}
