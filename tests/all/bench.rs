//! The tool that times and checks: what it refuses, what it reads, and that it finds what is wrong.

use crate::common::*;
use candle_core::{DType, Device, Tensor};
use candle_flash_kmeans::{Init, KMeans, Metric};
use clap::Parser;
use example::{check::Verdict, npy, Args};
use std::{fs, path::PathBuf};

#[allow(dead_code)] // Its `main`.
#[path = "../../examples/bench/main.rs"]
mod example;

fn run(args: &str) -> Result<(), String> {
    let args = Args::try_parse_from(["bench"].into_iter().chain(args.split_whitespace())).map_err(|e| e.to_string())?;
    example::run(&args).map_err(|e| format!("{e:#}"))
}

/// A file of the temporary directory, gone when it is dropped.
struct Written(PathBuf);

impl Written {
    fn new(name: &str, bytes: &[u8]) -> Self {
        let path = std::env::temp_dir().join(format!("flash-kmeans-bench-{}-{name}", std::process::id()));
        fs::write(&path, bytes).unwrap();
        Self(path)
    }
}

impl Drop for Written {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

/// A file of NumPy's format, version 1.0.
fn npy_bytes(dtype: &str, fortran: bool, shape: &str, values: &[u8]) -> Vec<u8> {
    let fortran = if fortran { "True" } else { "False" };
    let mut header = format!("{{'descr': '{dtype}', 'fortran_order': {fortran}, 'shape': {shape}, }}");
    while (10 + header.len() + 1) % 64 != 0 {
        header.push(' ');
    }
    header.push('\n');
    [b"\x93NUMPY\x01\x00", &(header.len() as u16).to_le_bytes()[..], header.as_bytes(), values].concat()
}

fn read(name: &str, bytes: &[u8]) -> Result<Tensor, String> {
    npy::read(&Written::new(name, bytes).0).map_err(|e| format!("{e:#}"))
}

#[test]
fn npy_files_of_either_order_hold_the_same_rows() {
    // Rows (1, 2, 3) and (4, 5, 6), as C and as Fortran store them.
    let (c, fortran) = ([1, 2, 3, 4, 5, 6], [1, 4, 2, 5, 3, 6]);
    type Bytes = fn(i32) -> Vec<u8>;
    let bytes: [(&str, Bytes, DType); 9] = [
        ("<f2", |v| half::f16::from_f32(v as f32).to_le_bytes().to_vec(), DType::F16),
        (">f2", |v| half::f16::from_f32(v as f32).to_be_bytes().to_vec(), DType::F16),
        ("<f4", |v| (v as f32).to_le_bytes().to_vec(), DType::F32),
        (">f4", |v| (v as f32).to_be_bytes().to_vec(), DType::F32),
        ("<f8", |v| (v as f64).to_le_bytes().to_vec(), DType::F64),
        (">f8", |v| (v as f64).to_be_bytes().to_vec(), DType::F64),
        ("|u1", |v| vec![v as u8], DType::U8),
        ("<i4", |v| v.to_le_bytes().to_vec(), DType::I32),
        (">i8", |v| (v as i64).to_be_bytes().to_vec(), DType::I64),
    ];
    for (name, bytes, dtype) in bytes {
        let all = |values: [i32; 6]| values.into_iter().flat_map(bytes).collect::<Vec<u8>>();
        for (order, values) in [(false, c), (true, fortran)] {
            let array = read("order.npy", &npy_bytes(name, order, "(2, 3)", &all(values))).unwrap();
            assert_eq!((array.dims(), array.dtype()), (&[2, 3][..], dtype), "{name}, Fortran {order}");
            assert!(array.is_contiguous());
            assert_eq!(f64s(&array), [1., 2., 3., 4., 5., 6.], "{name}, Fortran {order}");
        }
    }
    // Three dimensions: element (i, j, l) is 100 i + 10 j + l.
    let mut values = vec![];
    for (l, j, i) in (0..4).flat_map(|l| (0..3).flat_map(move |j| (0..2).map(move |i| (l, j, i)))) {
        values.extend((100.0 * i as f32 + 10.0 * j as f32 + l as f32).to_le_bytes());
    }
    let array = read("three.npy", &npy_bytes("<f4", true, "(2, 3, 4)", &values)).unwrap();
    assert_eq!(array.dims(), [2, 3, 4]);
    assert_eq!(array.get(1).unwrap().get(2).unwrap().to_vec1::<f32>().unwrap(), [120., 121., 122., 123.]);
}

#[test]
fn npy_files_of_other_shapes_become_rows_or_are_refused() {
    let floats = |count: usize| (0..count).flat_map(|v| (v as f32).to_le_bytes()).collect::<Vec<u8>>();
    for fortran in [false, true] {
        let column = read("one.npy", &npy_bytes("<f4", fortran, "(3,)", &floats(3))).unwrap();
        assert_eq!((column.dims(), f64s(&column)), (&[3, 1][..], vec![0., 1., 2.]));
        let none = read("none.npy", &npy_bytes("<f4", fortran, "()", &floats(1))).unwrap_err();
        assert!(none.contains("no dimensions"), "{none}");
    }
    let refused = [
        ("(2, 3)", "<f4", floats(5)),
        ("(2, 3)", "<c8", floats(12)),
        ("(2, 3)", "|S4", floats(6)),
        ("(2, 'x')", "<f4", floats(6)),
    ];
    for (shape, dtype, values) in refused {
        assert!(read("refused.npy", &npy_bytes(dtype, false, shape, &values)).is_err(), "{shape} {dtype}");
    }
    assert!(read("short.npy", b"\x93NUMPY").is_err());
    assert!(read("other.npy", b"PK\x03\x04 and so on").is_err());
    assert!(npy::read(&PathBuf::from("/there/is/none.npy")).is_err());
}

#[test]
fn files_of_any_shape_are_timed_or_refused() {
    let floats = |count: usize| (0..count).flat_map(|v| (v as f32).to_le_bytes()).collect::<Vec<u8>>();
    let bench = |name: &str, shape: &str, count: usize, args: &str| {
        let file = Written::new(name, &npy_bytes("<f4", true, shape, &floats(count)));
        run(&format!("assign --k 2 --reps 1 --check {args} --data {}", file.0.display()))
    };
    bench("matrix.npy", "(40, 3)", 120, "").unwrap();
    bench("problems.npy", "(2, 20, 3)", 120, "").unwrap();
    bench("column.npy", "(40,)", 40, "").unwrap();
    let refused =
        [("scalar.npy", "()", 1), ("empty.npy", "(0, 3)", 0), ("thin.npy", "(40, 0)", 0), ("few.npy", "(1, 3)", 3)];
    for (name, shape, count) in refused {
        assert!(bench(name, shape, count, "").is_err(), "{shape}");
    }
    let mut values = floats(120);
    values[40..44].copy_from_slice(&f32::NAN.to_le_bytes());
    let file = Written::new("nan.npy", &npy_bytes("<f4", false, "(40, 3)", &values));
    let error = run(&format!("assign --k 2 --data {}", file.0.display())).unwrap_err();
    assert!(error.contains("row 3"), "{error}");
}

#[test]
fn unknown_values_are_refused_with_those_that_are_known() {
    let known = [
        ("sort", "update"),
        ("assign --dtype f8", "bf16"),
        ("assign --dtype f32,i8", "bf16"),
        ("assign --device tpu", "cuda"),
        ("assign --metric hamming", "manhattan"),
        ("fit --init pca", "kmeans++"),
        ("update --labels unifrom", "hot"),
        ("assign --data gaussian", "nan-centroid"),
        ("assign --beside gaussian", "nan-centroid"),
        ("assign --n 64 --k 4 --kernel fastest", "cpu_gemm"),
    ];
    for (args, value) in known {
        let error = run(args).unwrap_err();
        assert!(error.contains(value), "{args}: {error}");
    }
}

#[test]
fn sizes_of_nothing_and_settings_that_do_not_fit_are_refused() {
    let refused = [
        "--b 0 --n 64 --k 4 --d 4",
        "--n 0 --k 4 --d 4",
        "--n 64 --k 0 --d 4",
        "--n 64 --k 4 --d 0",
        "--n 64 --k 65 --d 4",
        "--b 4294967295 --n 4294967295 --k 4 --d 64",
        "--n 64 --k 4 --d 4 --reps 0",
        "--n 64 --k 4 --d 4 --iters=-1",
        "--n 64 --k 4 --d 4 --budget=-1",
        "--n 64 --k 4 --d 4 --factor 0",
        "--n 64 --k 4 --d 4 --factor NaN",
        "--n 64 --k 4 --d 4 --data outlier --factor 1e39",
    ];
    // A fit of no iteration is its start and its labels.
    run("fit --n 64 --k 4 --d 4 --reps 1 --init greedy --iters 0 --check").unwrap();
    for op in ["assign", "nearest --m 4", "predict", "transform", "update", "fit", "fit-tol", "run"] {
        run(&format!("{op} --n 64 --k 4 --d 4 --reps 1")).unwrap();
        for args in refused {
            assert!(run(&format!("{op} {args}")).is_err(), "{op} {args}");
        }
    }
    for args in [
        "assign --weighted",
        "nearest",
        "nearest --m 0",
        "transform --data nan-centroid",
        "update --weighted",
        "fit --data nan-centroid",
        "update --data inf-centroid",
    ] {
        assert!(run(&format!("{args} --n 64 --k 4 --d 4")).is_err(), "{args}");
    }
    let error = run("fit-tol --beside blobs --n 64 --k 4 --d 4").unwrap_err();
    assert!(error.contains("beside fit"), "{error}");
    for args in ["update --data duplicate-centroids", "fit --init even --data duplicate-centroids"] {
        assert!(run(&format!("{args} --n 64 --k 4 --d 4")).is_err(), "{args}");
    }
}

#[test]
fn every_kind_of_data_is_timed_and_right() {
    let sizes = "--b 2 --n 300 --k 8 --d 5 --reps 1 --iters 4 --check --json";
    let data = "normal,blobs,offset,tight,duplicates,equal,outlier,duplicate-centroids";
    run(&format!("assign {sizes} --beside normal --data {data},nan-centroid,inf-centroid --dtype f16,bf16,f32"))
        .unwrap();
    for metric in ["squared_euclidean", "squared-euclidean", "euclidean", "cosine", "dot", "manhattan"] {
        run(&format!("assign {sizes} --metric {metric} --data nan-centroid,outlier")).unwrap();
        run(&format!("nearest {sizes} --m 3 --metric {metric} --data {data},nan-centroid,inf-centroid")).unwrap();
        run(&format!("transform {sizes} --metric {metric} --data {data} --dtype f16,f32,f64")).unwrap();
        run(&format!("fit {sizes} --metric {metric} --data {data} --weighted")).unwrap();
        run(&format!("run {sizes} --metric {metric} --dtype f16,f64 --beside normal --data blobs,duplicates")).unwrap();
    }
    // Problems that converge in other iterations each, before their centroids stand still.
    for metric in ["squared_euclidean", "manhattan"] {
        run(&format!("fit-tol --b 3 --n 3000 --k 3 --d 2 --reps 1 --iters 40 --check --json --metric {metric}"))
            .unwrap();
    }
    for init in ["random", "even", "kmeans++", "greedy", "kmeans||"] {
        run(&format!("fit {sizes} --init {init} --data outlier,normal --beside normal")).unwrap();
    }
    run("fit --b 2 --n 400 --k 5 --d 1 --init optimal --reps 1 --iters 3 --check --json").unwrap();
    for labels in ["uniform", "hot"] {
        run(&format!("update {sizes} --labels {labels} --data normal,offset,tight,equal --dtype f16,bf16,f32,f64"))
            .unwrap();
    }
}

/// Everything that a fit returns is judged: whatever is changed in it is found.
#[test]
fn a_check_finds_each_wrong_part_of_a_fit() {
    let x = blobs(&[2, 200, 3], 5, DType::F32, &mut rng(7));
    for metric in METRICS {
        let start = Init::Given(x.narrow(1, 0, 6).unwrap().contiguous().unwrap());
        let settings = KMeans::new(6).metric(metric).init(start).max_iters(3).tol(0.0);
        let right = settings.fit(&x).unwrap();
        let verdict = |change: &dyn Fn(&mut candle_flash_kmeans::Fit)| {
            let (mut fit, mut verdict) = (right.clone(), Verdict { same: true, ..Verdict::default() });
            change(&mut fit);
            verdict.fit(&x, None, &settings, &fit).unwrap();
            verdict
        };
        let unchanged = verdict(&|_| ());
        assert!(unchanged.is_right() && unchanged.checked() > 400, "{metric:?}: {unchanged}");
        assert!(unchanged.centroids.worst <= 1.0);
        let bumped = |t: &Tensor, by: f64| {
            let mut values = f64s(t);
            values[4] += by;
            Tensor::from_vec(values, t.shape(), &Device::Cpu).unwrap().to_dtype(t.dtype()).unwrap()
        };
        let label = (u32s(&right.labels)[4] + 1) % 6;
        let wrong_label = f64::from(label) - f64::from(u32s(&right.labels)[4]);
        let found = verdict(&|fit| fit.labels = bumped(&fit.labels, wrong_label));
        assert!(found.labels.wrong >= 1 && !found.is_right(), "{metric:?}");
        let found = verdict(&|fit| fit.centroids = bumped(&fit.centroids, 1e-3));
        assert!(found.centroids.wrong >= 1 && found.centroids.worst > 1.0 && !found.is_right(), "{metric:?}");
        let found = verdict(&|fit| fit.centroids = bumped(&fit.centroids, f64::NAN));
        assert!(found.centroids.wrong >= 1 && !found.is_right(), "{metric:?}: a NaN");
        let found = verdict(&|fit| {
            fit.counts = bumped(&fit.counts.to_dtype(DType::F64).unwrap(), 1.0).to_dtype(DType::U32).unwrap()
        });
        assert!(found.counts.wrong >= 1 && !found.is_right(), "{metric:?}");
        for factor in [1.0 + 1e-9, f64::NAN, 0.0] {
            let found = verdict(&|fit| fit.inertia = (&fit.inertia * factor).unwrap());
            assert!(found.inertia.wrong >= 1 && !found.is_right(), "{metric:?}");
        }
    }
}

#[test]
fn a_check_finds_wrong_means_and_labels() {
    let x = uniform(&[1, 100, 4], 0.0, 1.0, DType::F32, &mut rng(8));
    let labels = Tensor::from_iter((0..100u32).map(|i| i % 3), &Device::Cpu).unwrap().unsqueeze(0).unwrap();
    let means = candle_flash_kmeans::cluster_means(&x, &labels, 4).unwrap();
    let judge = |means: &Tensor| {
        let mut verdict = Verdict { same: true, ..Verdict::default() };
        verdict.means(&x, &labels, means).unwrap();
        verdict
    };
    assert!(judge(&means).is_right() && judge(&means).checked() == 16);
    // One unit in the last place more than rounding gives, in each component.
    let off = means.affine(1.0 + 3.0 * 2f64.powi(-23), 0.0).unwrap();
    assert_eq!(judge(&off).centroids.wrong, 12);
    assert_eq!(judge(&(&means * f64::NAN).unwrap()).centroids.wrong, 16);

    let c = uniform(&[1, 9, 4], 0.0, 1.0, DType::F32, &mut rng(9));
    let found = candle_flash_kmeans::assign(&x, &c, Metric::Dot).unwrap();
    let judge = |labels: &Tensor| {
        let mut verdict = Verdict { same: true, ..Verdict::default() };
        verdict.labels(&x, &c, labels, Metric::Dot, 1e9).unwrap();
        verdict
    };
    assert!(judge(&found).is_right() && judge(&found).labels.worst == 0.0);
    let shifted = (found.to_dtype(DType::F64).unwrap() + 1.0).unwrap().to_dtype(DType::U32).unwrap();
    let verdict = judge(&shifted);
    assert!(verdict.labels.wrong == 100 && verdict.labels.worst > 0.0 && !verdict.is_right(), "{verdict}");
    assert!(!Verdict { same: false, ..Verdict::default() }.is_right());

    let (found, distances) = candle_flash_kmeans::nearest(&x, &c, 3, Metric::Dot).unwrap();
    let judge = |labels: &Tensor| {
        let mut verdict = Verdict { same: true, ..Verdict::default() };
        verdict.nearest(&x, &c, labels, Metric::Dot, 1e9).unwrap();
        verdict
    };
    assert!(judge(&found).is_right() && judge(&found).checked() == 300);
    let swapped = found.index_select(&Tensor::new(&[0u32, 2, 1], &Device::Cpu).unwrap(), 2).unwrap();
    assert_eq!(judge(&swapped).labels.wrong, 200);
    let its_nearest = c.index_select(&found.get(0).unwrap().get(0).unwrap(), 1).unwrap();
    let judge = |distances: &Tensor| {
        let mut verdict = Verdict { same: true, ..Verdict::default() };
        verdict.distances(&x, &its_nearest, &distances.contiguous().unwrap(), Metric::Dot, 1e9).unwrap();
        verdict.distances.wrong
    };
    // Of the first row they are those to the three centroids that are its nearest.
    assert_eq!(judge(&distances.narrow(1, 0, 1).unwrap().broadcast_as((1, 100, 3)).unwrap()), 297);
}

#[test]
fn distances_that_are_no_numbers_are_never_the_nearest() {
    let x = Tensor::new(&[[[1f32, 2.], [3., 4.]]], &Device::Cpu).unwrap();
    let c = Tensor::new(&[[[f32::NAN, 0.], [f32::INFINITY, 0.], [9., 9.]]], &Device::Cpu).unwrap();
    let judge = |label: u32| {
        let mut verdict = Verdict { same: true, ..Verdict::default() };
        let labels = Tensor::full(label, (1, 2), &Device::Cpu).unwrap();
        verdict.labels(&x, &c, &labels, Metric::SquaredEuclidean, 1e9).unwrap();
        verdict.labels.wrong
    };
    assert_eq!([judge(0), judge(1), judge(2), judge(7)], [2, 2, 0, 2]);
}
