local mr = require "moonrabbit"
local testing = mr.testing

local function bench(consumer, opts)
  consumer.queue = "work"
  return testing.new(mr.app { name = "shop", queues = { work = {} }, consumers = { consumer } }, opts)
end

describe("moonrabbit.testing", function()
  it("runs a handler with the message that was delivered", function()
    local seen
    local b = bench { handler = function(msg) seen = msg end }
    local d = b:deliver("work", "body", { exchange = "e", routing_key = "k", headers = { a = 1 }, type = "t" })
    assert.equal("ok", d.outcome)
    assert.equal(1, d.attempts)
    assert.same({ "body", "e", "k", 1, "t" }, { seen.body, seen.exchange, seen.routing_key, seen.headers.a,
      seen.properties.type })
  end)

  it("brings retries back when their step is over, and not before", function()
    local runs, times = 0, {}
    local b
    b = bench({
      retry = mr.retry.exponential { first = 10, factor = 2, attempts = 3 },
      handler = function(msg)
        runs = runs + 1
        times[runs] = b:time()
        return nil, "no " .. msg.body
      end,
    }, { time = 1000000 })
    local d = b:deliver("work", "stock", { routing_key = "order.created", exchange = "orders" })
    assert.equal("retry", d.outcome)
    b:advance(9.9)
    assert.equal(1, runs)
    b:advance(0.1)
    assert.equal(2, runs)
    b:advance(3600)
    assert.same({ 1000000, 1000010, 1000030 }, times)
    assert.equal("dead_letter", d.outcome)
    assert.equal(3, d.attempts)
    assert.same({ 10, 20 }, d.delays)
    assert.equal("no stock", d.failure.message)
    local letter = b.dead_letters[1]
    assert.equal("shop.dead", letter.queue)
    assert.equal(3, letter.headers["moonrabbit-attempts"])
    assert.equal("order.created", letter.headers["moonrabbit-key"])
    assert.equal(1000000, letter.headers["moonrabbit-first-failure"])
  end)

  it("waits for short retries in the process, and a success after a failure is one", function()
    local runs = 0
    local b = bench {
      retry = mr.retry.constant { delay = 0.05 },
      handler = function()
        runs = runs + 1
        if runs < 3 then error "not yet" end
      end,
    }
    local d = b:deliver("work", "")
    assert.equal("retry", d.outcome)
    b:advance(1)
    assert.equal("ok", d.outcome)
    assert.equal(3, d.attempts)
    assert.same({ 0.05, 0.05 }, d.delays)
  end)

  it("asks policies with a deadline by its own clock", function()
    local b = bench {
      retry = mr.retry.by_error { { kind = "timeout", mr.retry.none() },
        otherwise = mr.retry.constant { delay = 100, attempts = 99, within = 250 } },
      handler = function() return nil, "no" end,
    }
    local d = b:deliver("work", "")
    b:advance(10000)
    assert.equal("dead_letter", d.outcome)
    assert.equal(4, d.attempts)
  end)

  it("notes what is published and forwarded", function()
    local b = bench { handler = function(msg, app)
      assert(app:publish("mail", { exchange = "mails", routing_key = "new", priority = 3, headers = { a = 1 } }))
      assert(app:forward(msg, "audit"))
    end }
    assert.equal("ok", b:deliver("work", "x", { routing_key = "k" }).outcome)
    local mail, audit = b.published[1], b.published[2]
    assert.same({ "mail", "mails", "new", 3, 1 }, { mail.body, mail.exchange, mail.routing_key,
      mail.properties.priority, mail.headers.a })
    assert.same({ "x", "audit", "k" }, { audit.body, audit.exchange, audit.routing_key })
    assert.equal(2, #b.published)
    b.fail = "disk full"
    assert.equal("dead_letter", (function()
      local d = b:deliver("work", "y")
      b.fail = nil
      b:advance(60)
      return d.outcome
    end)())
  end)

  it("sends on as the app does: with the key of the first publish, without what a copy must not have", function()
    local runs = 0
    local b = bench { retry = mr.retry.constant { delay = 5 }, handler = function(msg, app)
      runs = runs + 1
      if runs == 1 then return nil, "once" end
      return app:forward(msg, "audit", nil, { set = { by = "spec" } })
    end }
    b:deliver("work", "x", { exchange = "e", routing_key = "k", user_id = "u", headers = { CC = { "c" }, mine = 1 } })
    b:advance(5)
    local sent = b.published[1]
    assert.same({ "audit", "k", nil }, { sent.exchange, sent.routing_key, sent.properties.user_id })
    assert.same({ mine = 1, by = "spec" }, sent.headers)
  end)

  it("has a message's id, and rejects by default as the real one does", function()
    local id
    local b = bench { handler = function(msg) id = msg.message_id end }
    b:deliver("work", "", { message_id = "m" })
    assert.equal("m", id)
    b = bench { handler = function(msg) msg:reject() end }
    assert.equal("reject", b:deliver("work", "").message.settled)
  end)

  it("follows routes", function()
    local b = bench { route = mr.route.first {
      mr.route.header({ type = "refund" }, function() end),
      mr.route.key("order.#", mr.route.forward("orders")),
      mr.route.key("spam", mr.route.drop()),
      mr.route.otherwise(mr.route.dead_letter "no route"),
    } }
    assert.equal("ok", b:deliver("work", "", { headers = { type = "refund" } }).outcome)
    assert.equal(0, #b.published)
    assert.equal("ok", b:deliver("work", "", { routing_key = "order.x" }).outcome)
    assert.equal("orders", b.published[1].exchange)
    assert.equal("drop", b:deliver("work", "", { routing_key = "spam" }).outcome)
    local d = b:deliver("work", "")
    assert.same({ "dead_letter", "no route" }, { d.outcome, d.reason })
  end)

  it("ends the next wait of a task that was cancelled before it", function()
    local clock = require("moonrabbit.testing.clock").new(0)
    local woken
    local task = clock.spawn(function()
      local ok, err = mr.pcall(clock.sleep, 3600)
      woken = { ok, err == clock.cancelled, clock.now() }
    end)
    clock.cancel(task)
    clock.settle()
    assert.same({ false, true, 0 }, woken)
  end)

  it("lets handlers sleep and time out on its clock", function()
    local sleep = mr.sleep
    local b = bench { timeout = 5, handler = function(msg) mr.sleep(tonumber(msg.body)) end }
    local quick, slow = b:deliver("work", "4"), b:deliver("work", "6")
    assert.is_nil(quick.outcome)
    b:advance(4)
    assert.equal("ok", quick.outcome)
    assert.is_nil(slow.outcome)
    b:advance(1)
    assert.equal("dead_letter", slow.outcome)
    assert.equal("timeout", slow.failure.kind)
    assert.equal(sleep, mr.sleep)
  end)

  it("filters duplicates, and gathers batches", function()
    local b = bench { dedupe = mr.dedupe.memory {}, handler = function() end }
    assert.equal("ok", b:deliver("work", "", { message_id = "1" }).outcome)
    assert.equal("duplicate", b:deliver("work", "", { message_id = "1" }).outcome)
    local sizes = {}
    b = bench { batch = { size = 3, wait = 2 }, handler = function(list) sizes[#sizes + 1] = #list end }
    local last
    for i = 1, 4 do last = b:deliver("work", tostring(i)) end
    assert.same({ 3 }, sizes)
    assert.is_nil(last.outcome)
    b:advance(2)
    assert.same({ 3, 1 }, sizes)
    assert.equal("ok", last.outcome)
  end)

  it("does as the app does with a handler that settles its message itself", function()
    local b = bench { handler = function(msg) msg:ack() end }
    b:deliver("work", "")
    assert.equal("ack", b:deliver("work", "").message.settled)
    assert.equal(1, #b.log)
  end)

  it("goes on, as the app does, though an observer throws", function()
    local function broken() error(setmetatable({}, { __tostring = error })) end
    for _, metrics in ipairs { false, mr.metrics.new() } do
      local own, said = { delivered = broken, settled = broken, failed = broken, in_flight = broken }, {}
      own = require("moonrabbit.app.observer").guard(own, function(_, text) said[#said + 1] = text end)
      local b = testing.new(mr.app { name = "shop", queues = { work = {} },
        observer = metrics and metrics:observer(own) or own, log = function() end,
        consumers = { { queue = "work", concurrency = 1, retry = mr.retry.constant { delay = 0.05, attempts = 2 },
          handler = function(msg) if msg.body == "bad" then return nil, "no" end end } } })
      for _ = 1, 3 do
        assert.equal("ok", b:deliver("work", "").outcome)
        local bad = b:deliver("work", "bad")
        b:advance(1)
        assert.equal("dead_letter", bad.outcome)
      end
      assert.same({ 0, 0 }, { b.runners.work.in_flight, b.runners.work.running })
      assert.equal(4, #said) -- each once
    end
  end)

  it("says what is wrong", function()
    local b = bench { handler = function() end }
    local function fails(fn, text)
      local ok, err = pcall(fn)
      assert.is_false(ok)
      assert.truthy(tostring(err):find(text, 1, true), err)
    end
    fails(function() b:deliver("wokr", "") end, "did you mean 'work'?")
    fails(function() b:deliver("work", 5) end, "body")
    fails(function() b:deliver("work", "", { header = {} }) end, "header")
    fails(function() b:advance(-1) end, "seconds")
    fails(function() testing.new(5) end, "an app or the path")
    fails(function() testing.new "/no/such/script.lua" end, "no such file")
  end)
end)
