//! Five digits in a haystack: whether the model can still say them.

use crate::{
    methods::{Method, Prompt},
    Args, Coding,
};
use anyhow::{ensure, Result};
use candle_core::DType;
use models::{progress::progress, smollm2::SmolLm2};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

const DIGITS: usize = 5;
const BEFORE: &str =
    "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n\
    <|im_start|>user\nA pass key is hidden in a long text. Find it and remember it.\n\n";
const AFTER: &str = "\n\nWhat is the pass key?<|im_end|>\n<|im_start|>assistant\nThe pass key is ";

/// Hides a number at evenly spaced depths of prompts of so many `tokens`, made of pieces of `text`, and counts exact answers.
/// The question is asked after the prompt has been compressed.
pub fn run(model: &SmolLm2, text: &[u32], args: &Args, cases: usize, dtype: DType) -> Result<()> {
    let Args { tokens, ref budgets, .. } = *args;
    ensure!(cases > 0, "--passkey 0: there is nothing to measure");
    let codes = args.codes.first().map(|_| Method::Codes);
    let settings: Vec<_> = [(Method::Full, tokens)]
        .into_iter()
        .chain(
            Method::ALL.into_iter().chain(codes).flat_map(|method| budgets.iter().map(move |&budget| (method, budget))),
        )
        .collect();
    let mut right = vec![0; settings.len()];
    let (before, after) = (model.encode(BEFORE)?, model.encode(AFTER)?);
    let bar = progress(cases * (model.dims.layers + settings.len()), "passkey")?;
    for case in 0..cases {
        let mut rng = ChaCha8Rng::seed_from_u64(case as u64);
        let key = rng.random_range(10_000..100_000).to_string();
        let needle = model.encode(&format!("\n\nThe pass key is {key}. Remember it. {key} is the pass key.\n\n"))?;
        let digits = model.encode(&key)?;
        ensure!(digits.len() == DIGITS, "{} tokens for {DIGITS} digits: the tokenizer is wrong", digits.len());
        let straw = tokens.saturating_sub(before.len() + needle.len());
        ensure!(straw > 0 && straw < text.len(), "the text has {} tokens, {straw} are needed", text.len());
        let start = rng.random_range(0..text.len() - straw);
        let (straw, depth) = (&text[start..start + straw], straw * (2 * case + 1) / (2 * cases));
        let ids = [&before[..], &straw[..depth], &needle, &straw[depth..]].concat();
        let mut prompt = Prompt::new(model, &ids, args.grouping(), dtype, after.len() + DIGITS, &bar)?;
        if let Some(Coding { codes, .. }) = args.codes.first() {
            prompt.code(codes)?;
        }

        // Digits are said one by one, so the greedy answer is right if each is the likeliest after those before it.
        let asked = [&after[..], &digits[..DIGITS - 1]].concat();
        for ((method, budget), right) in settings.iter().zip(&mut right) {
            let predicted = prompt.follow(model, &asked, *method, *budget)?;
            let said = predicted.narrow(0, after.len() - 1, DIGITS)?.argmax(1)?.to_vec1::<u32>()?;
            *right += (said == digits) as usize;
            bar.inc(1);
        }
    }
    bar.finish_and_clear();
    println!("exact answers of {cases}, prompts of {tokens} tokens\n");
    println!("| tokens read | method | right |\n|---|---|---|");
    for ((method, budget), right) in settings.iter().zip(right) {
        println!("| {budget} | {} | {right} |", method.name());
    }
    Ok(())
}
