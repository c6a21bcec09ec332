-- moonrabbit dlq as its users have it: processes, exit codes, what is on stdout and what is left in the queues.
local cjson = require "cjson"
local moonrabbit = require "moonrabbit"
local broker = require "support.broker"
local process = require "support.process"
local support = require "support.disposal"
local filters = require "moonrabbit.cli.dlq.filters"
local ok = broker.ok

describe("filters of dead letters", function()
  it("match keys as a topic does", function()
    local yes = { { "#", "" }, { "#", "a.b" }, { "a.*", "a.b" }, { "a.#", "a" }, { "a.#", "a.b.c" }, { "*.b.#", "a.b" },
      { "a.#.c", "a.c" }, { "a.#.c", "a.b.b.c" }, { "a.b", "a.b" }, { "*", "a" }, { "#.#.#.c", "a.b.c" } }
    local no = { { "a.*", "a" }, { "a.*", "a.b.c" }, { "a", "b" }, { "*", "" }, { "a.#.c", "a.b" }, { "*.*", "a" } }
    for _, case in ipairs(yes) do assert.is_true(filters.key_matches(case[1], case[2]), table.concat(case, " ")) end
    for _, case in ipairs(no) do assert.is_false(filters.key_matches(case[1], case[2]), table.concat(case, " ")) end
    assert.is_false(filters.key_matches(("#.a."):rep(8) .. "b", ("a."):rep(20) .. "a"))
  end)

  it("match ages, headers and errors", function()
    local msg = { headers = { type = "refund", n = 5 }, properties = { message_id = "m" }, routing_key = "k" }
    local letter = { error = "cannot reach db-1", reason = "attempts", queue = "q", time = 1000 }
    local function match(args) return filters.match(args, msg, letter, 1600) end
    assert.is_true(match {})
    assert.is_true(match { older = 600, newer = 600, error = "db-1", reason = "attempts", queue_filter = "q", id = "m",
      routing_key = "*", header = { { "type", "refund" }, { "n", 5 } } })
    assert.is_true(match { header = { { "n", "5" } } })
    for _, args in ipairs { { older = 601 }, { newer = 599 }, { error = "db-2" }, { reason = "x" },
      { queue_filter = "r" }, { id = "n" }, { routing_key = "a.b" }, { header = { { "type", "order" } } },
      { header = { { "none", "x" } } } } do
      assert.is_false(match(args))
    end
    letter.time = nil
    assert.is_false(match { newer = 1e9 })
    assert.equal(5400, filters.age "1.5h")
    assert.equal(90, filters.age "90")
    assert.is_nil((filters.age "soon"))
  end)
end)

local it = broker.it_unless(it, pending, broker.none())

describe("moonrabbit dlq", function()
  local bench, parking

  before_each(function()
    if not broker.url then return end
    bench = support.start()
    parking = bench.d.parking
  end)
  after_each(function()
    if bench then bench:finish() end
    bench = nil
  end)

  local function dlq(...)
    return process.run({ "bin/moonrabbit", "dlq", ... }, { env = { AMQP_URL = broker.url } })
  end

  -- A command that only looks, or fails: what it took is back soon after its end, and not at once in a quorum queue.
  local function look(command, queue, ...)
    local before = bench:count(queue)
    local result = dlq(command, queue, ...)
    broker.eventually(function() return bench:count(queue) == before end, 10, "all is back in " .. queue)
    return result
  end

  local function json_lines(result)
    local list = {}
    for line in result.out:gmatch "[^\n]+" do list[#list + 1] = cjson.decode(line) end
    return list
  end

  -- Parks a message; fields of the failure, options of the publish.
  local function park(body, failure, opts)
    local msg = bench:deliver(body, opts)
    ok(bench.d:dead_letter(msg, failure.reason or "attempts", failure))
    msg:ack()
  end

  it("lists and shows, and leaves everything where it is", function()
    park("one", { message = "no route to\nhost", kind = "timeout", traceback = "stack:\n  here", attempt = 5 },
      { message_id = "m-1", headers = { type = "refund" } })
    park("two\255", { message = "bad", kind = "error" })
    local listed = look("list", parking)
    assert.equal(0, listed.code, listed.err)
    local line = "5×.*" .. bench.queue:gsub("%-", "%%-") .. ".*attempts: no route to host\n"
    assert.truthy(listed.out:find(line), listed.out)
    local objects = json_lines(look("list", parking, "--json"))
    assert.equal(2, #objects)
    assert.equal("m-1", objects[1].message_id)
    assert.equal("app", objects[1].by)
    assert.equal(bench.queue, objects[2].queue)
    assert.equal(1, #json_lines(look("list", parking, "--json", "--error", "bad")))
    assert.equal(1, #json_lines(look("list", parking, "--json", "-H", "type=refund")))
    assert.equal(1, #json_lines(look("list", parking, "--json", "--limit", "1")))
    local all = look("list", parking, "--json", "-k", "#", "--newer", "1h", "--died-in", bench.queue)
    assert.equal(2, #json_lines(all), all.err)
    local none = look("list", parking, "--older", "1h")
    assert.equal(1, none.code)
    assert.equal("", none.out)
    local shown = look("show", parking, "--id", "m-1")
    assert.equal(0, shown.code, shown.err)
    for _, text in ipairs { "error          no route to\nhost", "error kind     timeout", "attempts       5",
      'type = "refund"', 'message_id = "m-1"', "traceback\n  stack:\n    here\n", "body, 3 bytes\none\n" } do
      assert.truthy(shown.out:find(text, 1, true), text .. "\n" .. shown.out)
    end
    local second = cjson.decode(look("show", parking, "--error", "bad", "--json").out)
    assert.equal("base64", second.body_encoding)
    assert.equal("bad", second.dead_letter.error)
    assert.equal(0, look("show", parking, "2").code)
    assert.equal(1, look("show", parking, "3").code)
    assert.equal(2, bench:count(parking))
  end)

  it("replays to the queue where a message died, byte for byte, as new", function()
    local types = moonrabbit.types
    ok(bench.ch:queue_bind(bench.queue, "amq.topic", bench.name))
    local given = { exchange = "amq.topic", routing_key = bench.name, message_id = "m-1", priority = 3,
      content_type = "text/x", expiration = "60000", headers = { i8 = types.int8(-8), list = { 1, "a" } } }
    park("\0\255body", { message = "bad", kind = "error", attempt = 4 }, given)
    local dry = look("replay", parking, "--dry-run")
    assert.equal("1 would be replayed, 0 failed, 1 left in " .. parking .. "\n", dry.out)
    local result = dlq("replay", parking, "--json")
    assert.equal(0, result.code, result.err)
    assert.same({ queue = parking, replayed = 1, failed = 0, matched = 1, looked_at = 1, left = 0, dry_run = false },
      cjson.decode(result.out))
    local msg = bench:receive()
    assert.equal("\0\255body", msg.body)
    assert.same({ i8 = -8, list = { 1, "a" }, ["moonrabbit-exchange"] = "amq.topic", ["moonrabbit-key"] = bench.name,
      ["moonrabbit-queue"] = bench.queue, ["moonrabbit-app"] = bench.name, ["moonrabbit-replays"] = 1,
      ["moonrabbit-expiration"] = "60000" }, msg.headers)
    assert.equal("m-1", msg.properties.message_id)
    assert.equal(3, msg.properties.priority)
    assert.equal(1, bench.d:attempt(msg))
    assert.same({ "amq.topic", bench.name }, { bench.d:origin(msg) })
    -- And dies again: its replays go on counting.
    ok(bench.d:dead_letter(msg, "attempts", { message = "bad again", kind = "error" }))
    msg:ack()
    assert.equal(0, dlq("replay", parking).code)
    msg = bench:receive()
    assert.equal(2, msg.headers["moonrabbit-replays"])
    msg:ack()
  end)

  it("replays the whole way with --republish, CC included, or to another queue", function()
    local other = bench.name .. ".other"
    ok(bench.ch:queue_declare(other, { auto_delete = true }))
    ok(bench.ch:queue_bind(bench.queue, "amq.topic", bench.name))
    ok(bench.ch:queue_bind(other, "amq.topic", other))
    local given = { exchange = "amq.topic", routing_key = bench.name, headers = { CC = { other } } }
    park("x", { message = "bad", kind = "error" }, given)
    assert.equal(1, bench:count(other))
    assert.equal(0, dlq("replay", parking, "--republish").code)
    local msg = bench:receive()
    assert.same({ other }, msg.headers.CC)
    assert.equal("amq.topic", msg.exchange)
    assert.equal(2, bench:count(other))
    ok(bench.d:dead_letter(msg, "attempts", { message = "bad", kind = "error" }))
    msg:ack()
    assert.equal(0, dlq("replay", parking, "--to", other).code)
    assert.equal(3, bench:count(other))
    assert.equal(2, dlq("replay", parking, "--to", other, "--republish").code)
    ok(bench.ch:queue_delete(other))
  end)

  it("replays what the broker dead-lettered, as often as it dies", function()
    local dying, letters = bench.name .. ".dying", bench.name .. ".letters"
    ok(bench.ch:queue_declare(letters, { durable = true }))
    ok(bench.ch:queue_declare(dying, { durable = true, arguments = { ["x-message-ttl"] = 1,
      ["x-dead-letter-exchange"] = "", ["x-dead-letter-routing-key"] = letters } }))
    ok(bench:publisher():publish("x", { routing_key = dying }))
    for round = 1, 3 do
      broker.eventually(function() return bench:count(letters) == 1 end, 10, "death " .. round)
      local letter = json_lines(look("list", letters, "--json"))[1]
      assert.equal("broker", letter.by)
      assert.equal("expired", letter.reason)
      assert.equal(dying, letter.queue)
      assert.equal(dying, letter.routing_key)
      assert.equal(round - 1, letter.replays)
      assert.truthy(math.abs(letter.time - os.time()) < 60)
      assert.equal(0, dlq("replay", letters).code)
    end
    ok(bench.ch:queue_delete(dying))
    ok(bench.ch:queue_delete(letters))
  end)

  it("replays an expired letter and one over a delivery limit, and both come home from two retries", function()
    local home, letters, app = bench.name .. ".home-of-two", bench.name .. ".letters", bench.name .. ".app"
    local ch = ok(broker.connect():channel { confirm = true })
    ok(ch:queue_declare(letters, { durable = true }))
    ok(ch:queue_declare(home, { durable = true, arguments = { ["x-queue-type"] = "quorum", ["x-delivery-limit"] = 1,
      ["x-dead-letter-exchange"] = "", ["x-dead-letter-routing-key"] = letters } }))
    ok(ch:publish("poison", { routing_key = home }))
    local consumer = ok(ch:consume(home))
    for _ = 1, 2 do ok(consumer:receive(10)):nack { requeue = true } end
    ok(consumer:cancel())
    ok(ch:publish("expired", { routing_key = home, expiration = "1" }))
    broker.eventually(function() return bench:count(letters) == 2 end, 20, "both have died")
    local reasons = {}
    for _, letter in ipairs(json_lines(look("list", letters, "--json"))) do reasons[#reasons + 1] = letter.reason end
    table.sort(reasons)
    assert.same({ "delivery_limit", "expired" }, reasons)
    local attempts, done = {}, {}
    local running = moonrabbit.app {
      name = app, log = function() end, queues = { [home] = { passive = true } },
      consumers = { { queue = home, retry = moonrabbit.retry.steps { 0.1, 0.1 }, in_process = false,
        handler = function(msg)
          attempts[msg.body] = (attempts[msg.body] or 0) + 1
          if attempts[msg.body] < 3 then return nil, "no" end
          done[#done + 1] = msg.headers["moonrabbit-deaths"]["x-first-death-reason"]
        end } },
    }
    ok(running:start { consume = broker.connect(), publish = broker.connect() })
    assert.equal("2 replayed, 0 failed, 0 left in " .. letters .. "\n", dlq("replay", letters).out)
    broker.eventually(function() return #done == 2 end, 20, "both came home")
    assert.same({ poison = 3, expired = 3 }, attempts)
    table.sort(done)
    assert.same(reasons, done)
    running:stop(5)
    for _, queue in ipairs { app .. ".dead", app .. ".orphans", letters } do assert.equal(0, bench:count(queue)) end
    for _, each in ipairs { home, letters, app .. ".dead", app .. ".orphans", app .. ".wait.100ms" } do
      ok(ch:queue_delete(each))
    end
    for _, each in ipairs { ".home", ".orphans", ".wait.100ms" } do ok(ch:exchange_delete(app .. each)) end
  end)

  it("sends a ladder's orphans home once their queue is there again", function()
    local orphans = bench.d.ladder.orphans
    local msg = bench:deliver "orphan"
    ok(bench.consuming:cancel())
    ok(bench.ch:queue_delete(bench.queue)) -- before the message comes home
    ok(bench.d:retry(msg, 0.3, { message = "bad", kind = "error" }))
    msg:ack()
    broker.eventually(function() return bench:count(orphans) == 1 end, 20, "an orphan")
    local letter = json_lines(look("list", orphans, "--json"))[1]
    assert.same({ "app", "orphaned", bench.queue, "bad" }, { letter.by, letter.reason, letter.queue, letter.error })
    assert.equal(1, look("replay", orphans).code)
    ok(bench.ch:queue_declare(bench.queue, { durable = true }))
    local replayed = dlq("replay", orphans, "--reason", "orphaned")
    assert.equal(0, replayed.code, replayed.err)
    assert.equal("orphan", bench:take(bench.queue).body)
    assert.equal(0, bench:count(orphans))
  end)

  it("keeps what cannot be delivered, and says why", function()
    park("gone", { message = "bad", kind = "error" })
    park("stays", { message = "bad", kind = "error" })
    ok(bench.consuming:cancel())
    ok(bench.ch:queue_delete(bench.queue))
    local result = look("replay", parking)
    assert.equal(1, result.code)
    assert.truthy(result.err:find "2 not replayed: no queue takes the message", result.err)
    assert.equal("0 replayed, 2 failed, 2 left in " .. parking .. "\n", result.out)
    assert.equal(2, bench:count(parking))
  end)

  it("replays only what fits, at the rate it is told, and may be interrupted and started again", function()
    for i = 1, 40 do park("m" .. i, { message = i % 4 == 0 and "rare" or "common", kind = "error" }) end
    ok(bench.consuming:cancel())
    assert.equal("10 replayed, 0 failed, 30 left in " .. parking .. "\n", dlq("replay", parking, "--error", "rare").out)
    assert.equal(10, bench:count(bench.queue))
    broker.eventually(function() return bench:count(parking) == 30 end, 10, "what does not fit is back")
    local running = process.start({ "bin/moonrabbit", "dlq", "replay", parking, "--rate", "10" },
      { env = { AMQP_URL = broker.url } })
    broker.eventually(function() return bench:count(bench.queue) >= 13 end, 20, "some are replayed")
    running:signal "INT"
    assert.equal(130, running:wait(20), running:err())
    local said = tonumber(running:out():match "^(%d+) replayed, 0 failed")
    running:stop()
    local there = bench:count(bench.queue)
    assert.equal(10 + said, there)
    broker.eventually(function() return bench:count(parking) == 40 - there end, 10, "the rest is back")
    assert.is_true(there < 40)
    assert.equal(0, dlq("replay", parking).code)
    assert.equal(40, bench:count(bench.queue))
    local seen = {}
    for _ = 1, 40 do seen[bench:take(bench.queue).body] = true end
    for i = 1, 40 do assert.is_true(seen["m" .. i]) end
  end)

  it("ends at once at its limit or a signal, however slow the rate", function()
    for i = 1, 3 do park("m" .. i, { message = "bad", kind = "error" }) end
    ok(bench.consuming:cancel())
    local slow = { "bin/moonrabbit", "dlq", "replay", parking, "--rate", "0.01" } -- one in 100 seconds
    local limited = dlq("replay", parking, "--rate", "0.01", "--limit", "1")
    assert.equal("1 replayed, 0 failed, 2 left in " .. parking .. "\n", limited.out)
    local running = process.start(slow, { env = { AMQP_URL = broker.url } })
    broker.eventually(function() return bench:count(bench.queue) == 2 end, 20, "the first is replayed")
    running:signal "INT"
    assert.equal(130, running:wait(20), running:err())
    running:stop()
    broker.eventually(function() return bench:count(parking) == 1 end, 10, "the rest is there")
  end)

  it("killed in the middle of a replay, has lost nothing, and sends hardly anything twice", function()
    for i = 1, 60 do park("m" .. i, { message = "bad", kind = "error" }) end
    ok(bench.consuming:cancel())
    local running = process.start({ "bin/moonrabbit", "dlq", "replay", parking, "--rate", "20" },
      { env = { AMQP_URL = broker.url } })
    broker.eventually(function() return bench:count(bench.queue) >= 10 end, 20, "some are replayed")
    running:signal "KILL"
    assert.truthy(running:wait(20))
    running:stop()
    local there
    broker.eventually(function()
      there = bench:count(bench.queue) + bench:count(parking)
      return there >= 60 and bench:count(parking) > 0
    end, 20, "what was not acked is back")
    assert.is_true(there <= 60 + 16, there) -- as many as are under way at once
    assert.equal(0, dlq("replay", parking).code)
    local seen = {}
    for _ = 1, bench:count(bench.queue) do seen[bench:take(bench.queue).body] = true end
    for i = 1, 60 do assert.is_true(seen["m" .. i], "m" .. i) end
    assert.equal(0, bench:count(parking))
  end)

  it("shows how far it is on a terminal, and nowhere else", function()
    if os.execute "command -v script > /dev/null" ~= true and os.execute "command -v script > /dev/null" ~= 0 then
      return pending "needs script(1)"
    end
    for i = 1, 30 do park("m" .. i, { message = "bad", kind = "error" }) end
    ok(bench.consuming:cancel())
    local words = { "bin/moonrabbit", "dlq", "replay", parking, "--rate", "10", "--limit", "15" }
    local quiet = process.run(words, { env = { AMQP_URL = broker.url } })
    assert.same({ 0, "" }, { quiet.code, quiet.err })
    broker.eventually(function() return bench:count(parking) == 15 end, 10, "the rest is back")
    local command = process.command(words, { env = { AMQP_URL = broker.url } })
    local shown = process.run({ "script", "-qec", command, "/dev/null" }, { raw = true })
    assert.truthy(shown.out:find "replayed %d+ of 15 %(%d+%%%), %d+/s", shown.out)
    assert.truthy(shown.out:find("15 replayed, 0 failed, 0 left in", 1, true))
  end)

  it("purges what it is told to", function()
    for i = 1, 4 do park("m" .. i, { message = i == 1 and "rare" or "common", kind = "error" }) end
    assert.equal("1 would be purged, 0 failed, 4 left in " .. parking .. "\n",
      look("purge", parking, "--error", "rare", "--dry-run").out)
    assert.equal("1 purged, 0 failed, 3 left in " .. parking .. "\n", dlq("purge", parking, "--error", "rare").out)
    broker.eventually(function() return bench:count(parking) == 3 end, 10, "the rest is back")
    assert.equal("1 purged, 0 failed, 2 left in " .. parking .. "\n", dlq("purge", parking, "--limit", "1").out)
    broker.eventually(function() return bench:count(parking) == 2 end, 10, "the rest is back")
    assert.equal("2 purged, 0 failed, 0 left in " .. parking .. "\n", dlq("purge", parking).out)
  end)

  it("refuses nonsense, and queues that are not there", function()
    for _, words in ipairs { { "list" }, { "list", parking, "--older", "soon" }, { "replay", parking, "--rate", "0" },
      { "replay", parking, "--limit", "-1" }, { "show", parking, "zero" }, {} } do
      local result = dlq(words[1], words[2], words[3], words[4])
      assert.equal(2, result.code)
      assert.truthy(result.err:find "^moonrabbit: [^\n]+\n$", result.err)
    end
    local gone = dlq("list", bench.name .. ".none")
    assert.equal(1, gone.code)
    assert.truthy(gone.err:find("404", 1, true))
  end)
end)
