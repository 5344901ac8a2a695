"""The Python interface: edit a fact in a transformers model, run an experiment, read its records.

Everything public is a name of `editkit` itself. Ten lines edit a fact, ask for it and undo the
edit:

    import editkit

    model = editkit.load("tiny-gptj")  # or editkit.load(hf_model, tokenizer)
    update = editkit.edit(
        model, editor="rome", prompt="{} was born in", subject="Zoso Vosset", target="Tunit"
    )
    print(update)  # the probability of the target, the size of the update, the condition number
    prompt = model.tokenizer("Zoso Vosset was born in", return_tensors="pt")
    answer = model.network.generate(**prompt, max_new_tokens=2, do_sample=False)
    print(model.tokenizer.decode(answer[0]))  # Zoso Vosset was born in Tunit
    model.undo()
"""
