"""Real texts: 64 sentences from one word to a page, in many languages and in code, and eight of growing length."""

SENTENCES: tuple[str, ...] = (
    # One word.
    "Yes.",
    "Why?",
    "谢谢",
    "Entschuldigung!",
    # Proverbs.
    "A rolling stone gathers no moss.",
    "Still waters run deep.",
    "The early bird catches the worm, but the second mouse gets the cheese.",
    "Morgenstund hat Gold im Mund.",
    "Qui vivra verra.",
    "L'habit ne fait pas le moine.",
    "Más vale pájaro en mano que ciento volando.",
    "Chi va piano, va sano e va lontano.",
    "Água mole em pedra dura, tanto bate até que fura.",
    "Тише едешь — дальше будешь.",
    "猿も木から落ちる。",
    "千里之行，始于足下。",
    "가는 말이 고와야 오는 말이 곱다.",
    "الصبر مفتاح الفرج.",
    "Borta bra men hemma bäst.",
    "Damlaya damlaya göl olur.",
    # Article 1 of the Universal Declaration of Human Rights.
    "All human beings are born free and equal in dignity and rights. They are endowed with reason and conscience and "
    "should act towards one another in a spirit of brotherhood.",
    "Alle Menschen sind frei und gleich an Würde und Rechten geboren. Sie sind mit Vernunft und Gewissen begabt und "
    "sollen einander im Geist der Brüderlichkeit begegnen.",
    "Tous les êtres humains naissent libres et égaux en dignité et en droits. Ils sont doués de raison et de "
    "conscience et doivent agir les uns envers les autres dans un esprit de fraternité.",
    "Todos los seres humanos nacen libres e iguales en dignidad y derechos y, dotados como están de razón y "
    "conciencia, deben comportarse fraternalmente los unos con los otros.",
    "Tutti gli esseri umani nascono liberi ed eguali in dignità e diritti. Essi sono dotati di ragione e di coscienza "
    "e devono agire gli uni verso gli altri in spirito di fratellanza.",
    "人人生而自由，在尊严和权利上一律平等。他们赋有理性和良心，并应以兄弟关系的精神相对待。",
    "すべての人間は、生れながらにして自由であり、かつ、尊厳と権利とについて平等である。",
    "Все люди рождаются свободными и равными в своем достоинстве и правах.",
    # First sentences of books.
    "Call me Ishmael.",
    "It is a truth universally acknowledged, that a single man in possession of a good fortune, must be in want of a "
    "wife.",
    "Happy families are all alike; every unhappy family is unhappy in its own way.",
    "Als Gregor Samsa eines Morgens aus unruhigen Träumen erwachte, fand er sich in seinem Bett zu einem ungeheueren "
    "Ungeziefer verwandelt.",
    "Longtemps, je me suis couché de bonne heure.",
    "En un lugar de la Mancha, de cuyo nombre no quiero acordarme, no ha mucho tiempo que vivía un hidalgo de los de "
    "lanza en astillero, adarga antigua, rocín flaco y galgo corredor.",
    "Nel mezzo del cammin di nostra vita mi ritrovai per una selva oscura, ché la diritta via era smarrita.",
    "道可道，非常道。名可名，非常名。",
    "It was the best of times, it was the worst of times, it was the age of wisdom, it was the age of foolishness, it "
    "was the epoch of belief, it was the epoch of incredulity, it was the season of Light, it was the season of "
    "Darkness, it was the spring of hope, it was the winter of despair, we had everything before us, we had nothing "
    "before us, we were all going direct to Heaven, we were all going direct the other way.",
    "Alice was beginning to get very tired of sitting by her sister on the bank, and of having nothing to do: once or "
    "twice she had peeped into the book her sister was reading, but it had no pictures or conversations in it, “and "
    "what is the use of a book,” thought Alice “without pictures or conversations?”",
    # Speech.
    "Ask not what your country can do for you, ask what you can do for your country.",
    "Four score and seven years ago our fathers brought forth on this continent, a new nation, conceived in Liberty, "
    "and dedicated to the proposition that all men are created equal. Now we are engaged in a great civil war, testing "
    "whether that nation, or any nation so conceived and so dedicated, can long endure. We are met on a great "
    "battle-field of that war. We have come to dedicate a portion of that field, as a final resting place for those "
    "who here gave their lives that that nation might live. It is altogether fitting and proper that we should do "
    "this. But, in a larger sense, we can not dedicate -- we can not consecrate -- we can not hallow -- this ground. "
    "The brave men, living and dead, who struggled here, have consecrated it, far above our poor power to add or "
    "detract. The world will little note, nor long remember what we say here, but it can never forget what "
    "they did here.",
    # Science.
    "Water boils at 100 °C at sea level.",
    "E = mc²",
    "The mitochondrion is the powerhouse of the cell.",
    "Every action has an equal and opposite reaction.",
    "In a right triangle, the square of the hypotenuse is the sum of the squares of the other two sides.",
    "Light travels at 299,792,458 metres per second in vacuum.",
    "Attention is a weighted mean of values, and the weights are a softmax of products of queries and keys.",
    # Everyday.
    "How do I reset my password?",
    "I forgot my password and cannot log in.",
    "Where is the nearest train station?",
    "Could you recommend a good restaurant that is open late on Sundays?",
    "The parcel was delivered to the wrong address twice, and nobody answers the phone.",
    "Das Wetter ist heute schön, wir gehen in den Park.",
    "今天天气很好，我们一起去公园散步吧。",
    "Short and 长 mixed 在一起 in one sentence 🙂.",
    # Code.
    "print('Hello, world!')",
    "SELECT name, COUNT(*) FROM orders WHERE total > 100 GROUP BY name ORDER BY 2 DESC;",
    "git rebase --interactive HEAD~3",
    "for (int i = 0; i < n; i++) { sum += a[i] * b[i]; }",
    "def fibonacci(n):\n    a, b = 0, 1\n    for _ in range(n):\n        a, b = b, a + b\n    return a",
    "def quicksort(items):\n    if len(items) <= 1:\n        return items\n    pivot, *rest = items\n    smaller = [x "
    "for x in rest if x < pivot]\n    larger = [x for x in rest if x >= pivot]\n    return quicksort(smaller) + "
    "[pivot] + quicksort(larger)",
    '#include <stdio.h>\nint main(void) { puts("Hello"); return 0; }',
    "<!DOCTYPE html><html><head><title>404</title></head><body><h1>Not found</h1></body></html>",
    '{"model_type": "bert", "hidden_size": 384, "num_hidden_layers": 6}',
)

# From a few characters to a few sentences, in the two languages of the original publication and in English.
TEXTS: tuple[str, ...] = (
    "我爱你",
    "你也爱我",
    "今天天气很好，我们一起去公园散步吧。",
    "注意力掩码决定了每个词可以看到哪些词。",
    "Hello!",
    "A mask says who may look at whom.",
    "The quick brown fox jumps over the lazy dog, and the dog does not mind at all.",
    "Short and 长 mixed 在一起 in one sentence.",
)
