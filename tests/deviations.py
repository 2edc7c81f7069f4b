"""Every deliberate difference between this package and the original code, with its reason: one list for all tests.

A test that expects something other than a golden looks up the deviation here, so that an unlisted difference fails;
`test_deviations.py` fails for an entry that no test uses.
"""

from __future__ import annotations

DEVIATIONS: dict[str, str] = {
    # GLM-4
    "glm4_refuses_what_its_template_skips": (
        "v4: the published template leaves out tools of an unknown type, and takes tools in a user's message; both are "
        "errors here, so that nobody waits for a tool that the model was never told of"
    ),
    "damaged_calls_are_reported": (
        "v4: the original's server shows a tool call whose JSON is damaged as text; here it is a call with parameters "
        "None and the reason, as in generation 3"
    ),
    "no_blanks_around_control_tokens": (
        "v4: decoding with transformers 4.42 puts a blank on both sides of control tokens, which other releases and "
        "the other generations do not"
    ),
    # VisualGLM
    "typed_img_tags_are_text": (
        "VisualGLM: the original opens what stands between the last <img> and </img> of a prompt, so a question could "
        "make a server read a file or an address; here a picture is an argument, and <img> in a question is text"
    ),
    "addresses_are_fetched_on_request": (
        "VisualGLM: the original fetches every image_path that begins with http; here that needs allow_urls=True, and "
        "addresses in private networks are never fetched"
    ),
    "pictures_stand_upright": (
        "VisualGLM: a photo is turned as its EXIF data says, and 16 bits a channel are scaled to 8, where the "
        "original reads sideways and white pictures"
    ),
    # networks
    "hidden_states_are_batch_first": (
        "hidden_states and last_hidden_state of the originals are (tokens, batch, width); ours are (batch, tokens, "
        "width) as in every model of transformers, so sentence vectors are pooled over dim 1; .transpose(0, 1) gives "
        "the old layout"
    ),
    "caches_are_no_tuples": (
        "past_key_values of the originals is a tuple of (key, value) per layer, each (tokens, batch, heads, width); "
        "ours is a Cache of transformers, whose layers[i].keys and .values are (batch, heads, tokens, width); "
        "cache.reorder_cache(beams) does what model._reorder_cache did"
    ),
    "blocks_are_their_weights": (
        "transformer.layers (v2/v3: transformer.encoder.layers), the four matrices and the norms of a block have the "
        "originals' names; what only computes has not: no rotary_emb, core_attention, activation_func, add_bias or "
        "projection_size, and no numbers that the config has (encoder.num_layers, num_attention_heads_per_partition). "
        "layer_id (v2/v3: layer_number - 1) is attention.layer_idx, _get_layer(i) is layers[i], dropout is "
        "prefix_encoder.dropout; another attention goes in by attn_implementation. A block takes and returns hidden "
        "states (batch, tokens, width) alone, as hooks see"
    ),
    "saved_folders_hold_no_code": (
        "after register_for_auto_class() the originals' save_pretrained copies their .py files and writes auto_map; "
        "ours writes neither, and says so: a saved folder is read after `import chatglm`, or by engines that know "
        "ChatGLMModel"
    ),
    "peft_prompts_are_context": (
        "v1: what PEFT's prefix tuning, prompt tuning and P-tuning put in front of a text takes places 0, 1, 2, ... of "
        "the context, in training and in generate() alike; the original cannot run them (its masks have four "
        "dimensions). Its own P-tuning v2 prefix takes no places, in both"
    ),
    "hidden_states_end_after_the_final_norm": (
        "v2/v3: the original's last hidden state is the one before final_layernorm; every model of transformers "
        "gives the normalised one (what the head sees), and so did generation 1"
    ),
    "pad_rows_are_not_fully_visible": (
        "v2/v3: without a prefix the original makes the query rows of left pads fully visible, future included, to "
        "keep NaN out of its softmax; what those rows hold is never read, so only real rows are compared"
    ),
    "fully_hidden_rows_in_half_precision": (
        "v1: a query row of a pad sees nothing, and the result of its softmax depends on how masking rounds in half "
        "precision (in float32 it is uniform as in the original); no real row reads it"
    ),
    "the_prefix_is_not_in_the_cache": (
        "a P-tuning prefix is the same for every token, so it stands in front of the keys at every step instead "
        "of in the cache: a cache then counts tokens only, and static caches, cropping and reuse between turns "
        "work as without a prefix"
    ),
    "attentions_are_returned": (
        "v2/v3: the original returns None for output_attentions; transformers' eager attention gives them at no cost"
    ),
    "rotary_tables_grow": (
        "v2/v3: an input longer than seq_length raises in the original; ours computes a longer table"
    ),
    "rotary_tables_are_float32": (
        "v1/v2: in half precision the originals compute angles, cosines and sines in the model's dtype (in bfloat16, "
        'positions above 256 coincide); ours are float32 and cast. rope_precision="original" gives the old numbers'
    ),
    "the_classifier_reads_the_last_real_token": (
        "v2/v3: the originals' sequence classifier takes the last position, a pad where rows are padded on the right; "
        "ours takes the last token that the mask shows"
    ),
    "inputs_embeds_are_accepted": ("the originals crash on inputs_embeds without input_ids; soft prompts need them"),
    "plain_masks_are_accepted": (
        "v1: the original accepts only its own bool 4-D mask; a plain 2-D int mask (1 = real token) is what "
        "tokenizers, data collators and generate() of transformers make. A 4-D mask of integers, which could mean "
        "either, is an error in both (RuntimeError there, ValueError here)"
    ),
    "one_kind_of_positions_goes_on": (
        "v1 with position_encoding_2d=false: the original's steps after [gMASK] stay at its place, where its own "
        "prompts count on; ours counts on in both, so that a cache changes nothing (no published model has it)"
    ),
    "the_cache_is_on_by_default": (
        "v1: ChatGLMConfig() alone has use_cache=False in the original; ours is True, as every published config.json is"
    ),
    "fp32_residual_works_in_half_precision": (
        "v2/v3: fp32_residual_connection in an fp16 model mixes dtypes and crashes in the original; ours computes"
    ),
    # generate()
    "ids_alone_are_read_as_padded": (
        "v1: from ids alone the original reads the pads of a batch as context; ours sees them as padding, so that a "
        "row gives the same text alone, in a batch and with the tokenizer's mask; a mask of ones gives the old numbers"
    ),
    "pads_take_no_positions": (
        "v2/v3: without position_ids the original counts left pads as positions, so that with a P-tuning prefix "
        "(which has none) a padded batch gives other texts than its rows alone; transformers derives the "
        "positions from the mask"
    ),
    "beam_scores_count_generated_tokens": (
        "beam scores in transformers 4.30 are divided by the length with the prompt and its left pads, today's by"
        " the generated length only: scores are compared after undoing the division, and where hypotheses of "
        "different lengths compete (an eos inside the search) another one may win"
    ),
    "minus_infinity_is_a_valid_score": (
        "the InvalidScoreLogitsProcessor of the originals' chat also fires on -inf, which bad_words_ids and "
        "min_new_tokens set on purpose, and then forces token 5; ours keeps the distribution of the remaining tokens"
    ),
    "greedy_ignores_warpers": (
        "the original's stream_generate applies top-k even when it does not sample; it cannot change the arg max,"
        " and generate() leaves the scores alone"
    ),
    "without_a_limit_the_context_is_the_limit": (
        "stream_generate without max_length and max_new_tokens ends after 20 tokens, prompt included, in the originals "
        "(the default of transformers then); ours continues to the end of the context"
    ),
    "every_stop_token_of_a_list_stops": (
        "v1/v2: the original's stream_generate never stops at a token of an eos list with two or more ids, and none of "
        "them runs without an eos; ours stops at each of the list, and without one at the limit"
    ),
    "a_finished_row_is_padded": (
        "a row of a batch that has ended continues in the originals' stream_generate, so that its end has to be "
        "searched for; ours fills it with pads, as generate() does"
    ),
    # chat and stream_chat
    "a_prompt_without_room_is_an_error": (
        "a prompt of max_length tokens or more: the originals answer with one token or none, ours names the lengths, "
        "and so does generate()"
    ),
    "old_turns_make_room_for_the_answer": (
        "a history that leaves no room: the originals feed all of it, up to memory or max_length; ours leaves out the "
        "oldest turns so that 512 tokens (a quarter of a small max_length) are left; answer_room=1 keeps all that fits"
    ),
    "temperature_zero_is_greedy": (
        "temperature=0 is a ValueError in the originals' chat, and means the default in their API; ours takes the most "
        "likely token"
    ),
    "arguments_are_left_alone": (
        "v3's chat appends the question to the caller's history, all append to the caller's logits_processor, and the "
        "processor overwrites the scores that it is given; ours changes nothing of the caller's"
    ),
    "numbers_that_are_not_finite_are_an_error": (
        "chat and stream_chat of the originals answer NaN or infinite logits with token 5, again and again; ours names "
        "where they began. With InvalidScoreLogitsProcessor in logits_processor it is as in the originals"
    ),
    "a_cached_turn_equals_an_uncached_one": (
        "with past_key_values the originals feed a differently tokenized new round (v3: with [gMASK] sop in between) "
        "and count max_length without the past, so that answers depend on whether there was a cache"
    ),
    "the_last_token_is_kept": (
        "v1's stream_chat ends before the token at max_length, v3's chat and stream_chat always cut the last token; "
        "only a stop token is left out here. stream_generate gives that, too, in v1 as in v2 and v3"
    ),
    "a_message_boundary_is_a_line_break": (
        "v3, several messages in one answer: the original's streamed text starts over at the boundary; here it "
        "continues after a line break, and the last item is the last message as in chat"
    ),
    "a_streamed_call_is_text_until_it_is_whole": (
        "v3: the original runs eval on the unfinished call and crashes, or yields dicts of unfinished code"
    ),
    "half_characters_are_held_back": (
        "v1 yields texts that end in U+FFFD inside a character; v2 and v3 skip any text that ends in U+FFFD, and lose "
        "it if it is the last"
    ),
    "blank_yields_are_left_out": (
        "v3 lags by a token and starts with an empty text, v1 and v2 yield nothing for an empty answer; here texts "
        "come when they change, and the last always comes"
    ),
    # tokenizers and prompts
    "typed_control_tokens_stay_text": (
        "v1: the original turns [MASK], <sop>, <eop>, <pad> and <unk> typed by a user into control tokens, so a prompt"
        " can be injected (zai-org/ChatGLM-6B#596); ours does so only with split_special_tokens=False"
    ),
    "gmask_is_recognised_where_asked_for": (
        "v1: where the caller asks for control tokens in a text, [gMASK] (v1.0: and <eop>) are among them, so that"
        " the text of a prompt can be encoded again; in the original they stay text"
    ),
    "the_old_vocabulary_works_like_the_new": (
        "v1.0: ids are v1.1's plus 20,000 and everything else is as in v1.1: pairs have the answer behind <sop>,"
        " padded batches have mask and positions, [gMASK] <sop> always follow, decoding [] or a single id works, and"
        " answers get full-width punctuation; v1.0's own code put answers in front of [gMASK] and crashed on []"
    ),
    "ids_without_a_piece_are_silent": (
        "v1/v2: the head of a model is padded beyond its vocabulary; the original raises IndexError when such an id"
        " is decoded, ours gives no text for it, as the original of v3 does"
    ),
    "control_ids_have_names": (
        "v2/v3: convert_ids_to_tokens gives the names of <unk>, <s>, </s> and of v2's control tokens instead of empty"
        " strings: idioms like `tokenizer.pad_token_id = tokenizer.eos_token_id` go through names"
    ),
    "special_tokens_are_listed": (
        "all_special_tokens of v2/v3 is empty in the original and lacks [gMASK] in v1, so skip_special_tokens=True has"
        ' no effect in v3 ("[gMASK]sop" stays in the text); ours lists the control tokens and skips them'
    ),
    "single_ids_decode_like_lists": (
        'v2/v3: decode(100) goes through the characters of the piece\'s name and gives "<0x61>"; ours is decode([100])'
    ),
    "image_names_need_image_tokens": (
        'v1.1: the original maps "<image_7>" to id 7 and id -1 to "<image_-1>" although the vocabulary has no image'
        " tokens; ours knows such names only where they exist"
    ),
    "wrong_names_are_value_errors": (
        "v2/v3: unknown roles and control tokens raise ValueError with the list of known ones, not AssertionError"
    ),
    "none_is_not_written": (
        'v3: `"tools": None` and `"metadata": None` in a message are as if the key were not there; the original writes '
        'them into the prompt as "null" and "None". An empty list of tools is "[]" in both'
    ),
    "tools_belong_to_a_system_message": (
        "v3: the original silently leaves out the tools of a message of another role; ours is a ValueError"
    ),
    "wrapped_tools_are_unwrapped": (
        'v3: OpenAI\'s {"type": "function", "function": …} becomes the bare description the model was trained with; '
        "the original pastes the wrapper into the prompt"
    ),
    "calls_are_read_not_run": (
        "v3 with tools: the original runs eval() on what the model wrote and raises the resulting error; ours reads "
        "tool_call(name=literal, …), and returns anything else as text, with the reason under `error`"
    ),
    "a_first_line_that_is_no_name_is_text": (
        "v3: the original takes the first line of every answer for the name of a tool, so that of two lines of text "
        "the first is lost; ours does where it is a name and a call or code follows"
    ),
    "interpreter_code_is_kept": (
        "v3 with tools: the original runs eval() on what the model wrote, for the interpreter, too, and returns its"
        " None as parameters; ours never runs it, and the code is in the result"
    ),
    "training_prompts_are_those_of_chat": (
        'ptuning of v1 trains an empty history with "[Round 0]" but chat asks the bare question; ours uses chat\'s'
        " prompt for both"
    ),
    # fine-tuning data
    "truncation_keeps_the_question": (
        "the original scripts cut a long prompt at its end, so that the current question and the mark that asks for"
        " an answer are what is lost (17 % of AdvertiseGen with v2's defaults); ours drops the oldest turns, then the"
        " middle of the question"
    ),
    "references_are_whole": (
        "the originals cut the references to the length of an answer before ROUGE and BLEU compare with them, so that "
        "a short limit raises the scores; ours are whole, and --cut_references gives the old numbers"
    ),
    "the_source_prefix_is_part_of_the_question": (
        "the originals put source_prefix in front of the assembled prompt, which no chat can send; ours puts it in"
        " front of every question (the same for v1 without a history)"
    ),
    "observations_are_never_learned": (
        "v3: finetune_hf.py gives the messages of the role observation loss, and ignores `loss`; what a tool returned"
        " is given, not said by the model, as in the originals' older preprocess_utils.py"
    ),
    "a_row_with_an_empty_list_of_tools_has_none": (
        "v3: the originals put the message with the tools (`[]`) in front of a row whose `tools` is an empty list; "
        "that is how data with one schema for all rows says that there are none, and a system message with "
        '`"tools": []` of its own is written as in chat'
    ),
    "one_system_message_with_tools": (
        "v3: the originals put the message with the tools in front of the row's own system message; ours makes one"
        " of the two, as chat and the API do"
    ),
    "conversations_end_with_what_is_learned": (
        "v3: the originals keep messages behind the last learned one; nothing there has loss, and causal attention"
        " does not see it, so only the token that ends the answer stays"
    ),
    "none_is_no_text": (
        "v1/v2: in a history of pairs the originals write None as the word \"None\"; ours is an empty text (a greeting "
        "without a question, an interrupted answer), a round of nothing is left out, and so is a last round that holds "
        "the present question with None for the answer to come"
    ),
    # several GPUs
    "no_gpu_is_left_idle": (
        "the originals round each GPU's share of the blocks up, so that for many numbers of GPUs (7, 9, 11 to 14, 16 "
        "and more) the last ones get none; ours gives every GPU its part, up to one per block"
    ),
    # quantisation
    "inputs_of_quantised_matrices_are_rounded": (
        "by default our CPU kernels round what goes into a quantised matrix to about 14 bits (1e-3 of the logits' "
        'scale in the goldens) for speed; precision="exact" gives the originals\' numbers up to the noise of float32'
    ),
    "scales_are_float16": (
        "v2/v3: quantising a float32 or bfloat16 model gives scales of that type in the original; ours are float16 as"
        " in generation 1 and in every published checkpoint, and bfloat16 weights are divided in float32"
    ),
}
