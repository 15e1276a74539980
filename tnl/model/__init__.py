"""Importing this package makes transformers' Auto classes know TransNormerLLM."""

from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from tnl.model.configuration_transnormer import TransnormerConfig
from tnl.model.modeling_transnormer import TransnormerForCausalLM
from tnl.model.tokenization_baichuan import BaiChuanTokenizer

AutoConfig.register("transnormer", TransnormerConfig, exist_ok=True)
AutoModelForCausalLM.register(TransnormerConfig, TransnormerForCausalLM, exist_ok=True)
AutoTokenizer.register(TransnormerConfig, slow_tokenizer_class=BaiChuanTokenizer, exist_ok=True)
