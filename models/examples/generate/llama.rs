//! The quantized Llama of candle-transformers with positions for longer prompts, as it is and with `drop_in/quantized_llama.patch`.
//! What the example asks of them beside their own functions is added here.

#[allow(warnings, clippy::all)]
pub mod original {
    include!(concat!(env!("OUT_DIR"), "/long_original_quantized_llama.rs"));

    impl ModelWeights {
        /// Goes on from keys and values `(1, key heads, tokens, head_dim)` of each layer, as if it had read these tokens itself.
        pub fn set_caches(&mut self, caches: impl IntoIterator<Item = (Tensor, Tensor)>) {
            self.layers.iter_mut().zip(caches).for_each(|(layer, cache)| layer.kv_cache = Some(cache));
        }
    }
}

#[allow(warnings, clippy::all)]
pub mod patched {
    include!(concat!(env!("OUT_DIR"), "/long_patched_quantized_llama.rs"));

    impl ModelWeights {
        pub fn layers(&self) -> impl Iterator<Item = &ClusteredAttention> {
            self.layers.iter().map(|layer| &layer.kv_cache)
        }

        pub fn layers_mut(&mut self) -> impl Iterator<Item = &mut ClusteredAttention> {
            self.layers.iter_mut().map(|layer| &mut layer.kv_cache)
        }

        /// The same with the weights of its blocks in f32: a prompt reads each weight many times, and Candle's products with quantized
        /// weights take a row at a time. Experts stay as they are.
        pub fn dequantized(&self, device: &Device) -> Result<Self> {
            let mut model = self.clone();
            for layer in &mut model.layers {
                let LayerWeights { attention_wq, attention_wk, attention_wv, attention_wo, mlp_or_moe, .. } = layer;
                let mut products = vec![attention_wq, attention_wk, attention_wv, attention_wo];
                if let MlpOrMoe::Mlp(mlp) = mlp_or_moe {
                    products.extend([&mut mlp.feed_forward_w1, &mut mlp.feed_forward_w2, &mut mlp.feed_forward_w3]);
                }
                for product in products {
                    if let candle::quantized::QMatMul::QTensor(weights) = &product.inner {
                        product.inner = candle::quantized::QMatMul::Tensor(weights.dequantize(device)?);
                    }
                }
            }
            Ok(model)
        }

        /// The logits after some tokens, and then the clusters of what waits for it, of all layers in one call.
        pub fn forward_and_cluster(&mut self, ids: &Tensor, offset: usize) -> Result<Tensor> {
            let logits = self.forward(ids, offset)?;
            ClusteredAttention::cluster_layers(self.layers_mut())?;
            Ok(logits)
        }

        /// Keys and values of all tokens, layer by layer.
        pub fn caches(&self) -> Result<Vec<(Tensor, Tensor)>> {
            let of = |layer: &ClusteredAttention| {
                let (k, v) = (layer.cache().k()?, layer.cache().v()?);
                let empty = "a prompt has been read";
                Ok((k.expect(empty).contiguous()?, v.expect(empty).contiguous()?))
            };
            self.layers().map(of).collect()
        }
    }
}
