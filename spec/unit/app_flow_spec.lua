local Breaker = require "moonrabbit.app.flow.breaker"
local Rate = require "moonrabbit.app.flow.rate"
local outcome = require "moonrabbit.app.outcome"
local rig = require "support.runner_bench"

describe("order_by", function()
  local function by_key(msg) return msg.k end

  it("handles a key's messages one at a time, in order, and other keys' meanwhile", function()
    local r
    local log, busy, most = {}, {}, 0
    r = rig.new { order_by = by_key, concurrency = 8, handler = function(msg)
      assert.is_nil(busy[msg.k])
      busy[msg.k] = true
      local running = 0
      for _ in pairs(busy) do running = running + 1 end
      most = math.max(most, running)
      r.runtime.sleep(msg.takes or 1)
      busy[msg.k] = nil
      log[#log + 1] = msg.k .. msg.i
    end }
    for i = 1, 3 do
      for _, k in ipairs { "a", "b" } do r:give { k = k, i = i, takes = k == "a" and 1 or 0.1 } end
    end
    r.runtime.advance(10)
    assert.equal(2, most)
    assert.same({ "b1", "b2", "b3", "a1", "a2", "a3" }, log)
    assert.equal(0, r.runner.in_flight)
    assert.is_nil(next(r.runner.order.lanes))
  end)

  it("holds the key during a retry, which is in the process", function()
    local log = {}
    local r = rig.new { order_by = by_key, retry = function() return 60 end, handler = function(msg)
      log[#log + 1] = msg.i
      if msg.i == 1 and #log == 1 then return nil, "once" end
    end }
    r:give { k = "a", i = 1 }
    r:give { k = "a", i = 2 }
    r.runtime.advance(59)
    assert.same({ 1 }, log)
    r.runtime.advance(2)
    assert.same({ 1, 1, 2 }, log)
    assert.same({}, r.copies)
  end)

  it("does not handle what has gone back to the queue while it waited", function()
    local r
    local handled = 0
    r = rig.new { order_by = by_key, handler = function()
      handled = handled + 1
      r.runtime.sleep(5)
    end }
    r:give { k = "a" }
    local second = r:give { k = "a" }
    r.runtime.advance(1)
    second.gone = true
    r.runtime.advance(10)
    assert.equal(1, handled)
    assert.same({ "ok", "requeue" }, r.outcomes)
  end)

  it("fails a message whose key cannot be made, and has no order without one", function()
    local r = rig.new { order_by = function(msg) return msg.missing.field end, handler = function() end }
    r:handle()
    assert.equal("dead_letter", r.copies[1][1])
    assert.truthy(r.copies[1][4].message:find("order_by", 1, true))
    r = rig.new { order_by = function() return 0 / 0 end, handler = function() end }
    r:handle()
    assert.truthy(r.copies[1][4].message:find("NaN", 1, true))
    r = rig.new { order_by = by_key, handler = function() end }
    assert.equal("ack", r:handle({}).done)
  end)
end)

describe("order_by that throws", function()
  it("fails the message each time that it is retried, and its handler does not run", function()
    local handled, asked = 0, {}
    local r = rig.new { order_by = function(msg) return msg.missing.field end,
      handler = function() handled = handled + 1 end,
      retry = function(_, err, attempt)
        asked[#asked + 1] = attempt
        assert.truthy(err.message:find("order_by", 1, true))
        return attempt < 3 and 1 or nil
      end }
    r:handle({}, 10)
    assert.equal(0, handled)
    assert.same({ 1, 2, 3 }, asked)
    assert.same({ "retry", "retry", "dead_letter" }, r.outcomes)
    assert.equal(0, r.runner.in_flight)
    assert.equal(0, r.runner.running)
  end)
end)

describe("batch", function()
  local function gather(fields)
    local r
    local batches = {}
    local consumer = { batch = { size = 3, wait = 2 }, handler = function(list)
      batches[#batches + 1] = #list
      if fields.handler then return fields.handler(list, r) end
    end }
    for key, value in pairs(fields) do if key ~= "handler" then consumer[key] = value end end
    r = rig.new(consumer)
    return r, batches
  end

  it("is handled when it is full, and when its first message has waited long enough", function()
    local r, batches = gather {}
    local list = {}
    for i = 1, 5 do list[i] = r:give() end
    r.runtime.advance(1)
    assert.same({ 3 }, batches)
    assert.equal("ack", list[3].done)
    assert.is_nil(list[4].done)
    r.runtime.advance(1)
    assert.same({ 3, 2 }, batches)
    assert.equal("ack", list[5].done)
    assert.equal(0, r.runner.in_flight)
    assert.equal(0, r.runner.running)
  end)

  it("fails as a whole", function()
    local r = gather { handler = function() return nil, "no" end, retry = function() return 5 end }
    for i = 1, 3 do r:give { attempts = i } end
    r.runtime.advance(1)
    assert.equal(3, #r.copies)
    local attempts = {}
    for i, copy in ipairs(r.copies) do attempts[i] = copy[5] end
    table.sort(attempts)
    assert.same({ 1, 2, 3 }, attempts)
  end)

  it("has an outcome for each message", function()
    local r = gather { retry = function() return 5 end, handler = function()
      return { [1] = true, [2] = outcome.drop(), [3] = "no stock" }
    end }
    for i = 1, 3 do r:give { i = i } end
    r.runtime.advance(1)
    table.sort(r.outcomes)
    assert.same({ "drop", "ok", "retry" }, r.outcomes)
    assert.equal(3, r.copies[1][2].i)
    assert.equal("no stock", r.copies[1][4].message)
  end)

  it("fails where its results mean nothing", function()
    for _, results in ipairs { { [4] = true }, { x = 1 } } do
      local r = gather { handler = function() return results end, retry = function() return 5 end }
      for _ = 1, 3 do r:give() end
      r.runtime.advance(1)
      assert.equal("nonsense", r.copies[1][4].kind)
    end
  end)

  it("has one timeout", function()
    local r = gather { timeout = 10, retry = function() return 5 end, handler = function(_, r)
      r.runtime.sleep(1e6)
    end }
    for _ = 1, 3 do r:give() end
    r.runtime.advance(11)
    assert.equal(3, #r.copies)
    assert.equal("timeout", r.copies[1][4].kind)
    assert.equal(0, r.runner.running)
  end)

  it("has one timeout where its handler cannot be ended, too", function()
    local r = gather { timeout = 10, retry = function() return 5 end, handler = function(_, r)
      r.runtime.sleep(100)
    end }
    r.runtime.cancel = nil
    for _ = 1, 3 do r:give() end
    r.runtime.advance(200)
    assert.equal(3, #r.copies)
    assert.equal(0, r.runner.running)
    assert.equal(0, r.runner.in_flight)
    assert.equal(0, r.runner.stuck)
  end)

  it("bounds the batches that run", function()
    local running, most = 0, 0
    local r = gather { concurrency = 2, prefetch = 50, handler = function(_, r)
      running = running + 1
      most = math.max(most, running)
      r.runtime.sleep(1)
      running = running - 1
    end }
    for _ = 1, 15 do r:give() end
    r.runtime.advance(10)
    assert.equal(2, most)
    assert.equal(15, #r.outcomes)
  end)

  it("leaves out what the broker has taken back while it was gathered, or waited for a place", function()
    local seen = {}
    local r, batches = gather { concurrency = 1, handler = function(list, r)
      for _, msg in ipairs(list) do seen[#seen + 1] = msg.i end
      r.runtime.sleep(5)
    end }
    local list = {}
    for i = 1, 6 do list[i] = r:give { i = i } end
    r.runtime.advance(1)
    for i = 3, 6 do list[i].gone = i ~= 5 end -- the first three are being handled
    list[7] = r:give { i = 7 }
    r.runtime.advance(0)
    list[7].gone = true -- alone in its batch
    r.runtime.advance(20)
    assert.same({ 1, 2, 3, 5 }, seen)
    assert.same({ "ack", nil, "ack", nil }, { list[1].done, list[4].done, list[5].done, list[7].done })
    assert.same({ 3, 1 }, batches)
    assert.same({ 0, 0 }, { r.runner.in_flight, r.runner.running })
  end)

  it("retries a message in the process as a batch of its own", function()
    local n = 0
    local r, batches = gather { retry = function() return 5 end, handler = function(list)
      n = n + 1
      if n == 1 then return { [2] = "once" } end
      assert.equal(2, list[1].i)
    end }
    function r.disposal.in_process() return true end
    for i = 1, 3 do r:give { i = i } end
    r.runtime.advance(10)
    assert.same({ 3, 1 }, batches)
    assert.equal(0, r.runner.in_flight)
  end)

  it("leaves duplicates out", function()
    local memory = require "moonrabbit.app.dedupe.memory"
    local r, batches = gather { dedupe = memory.new { now = function() return 0 end } }
    for _, id in ipairs { "a", "b", "c" } do r:give { properties = { message_id = id } } end
    r.runtime.advance(1)
    for _, id in ipairs { "a", "d", "e", "f" } do r:give { properties = { message_id = id } } end
    r.runtime.advance(1)
    assert.same({ 3, 3 }, batches)
    table.sort(r.outcomes)
    assert.same({ "duplicate", "ok", "ok", "ok", "ok", "ok", "ok" }, r.outcomes)
  end)

  it("does not wait when the runner stops", function()
    local r, batches = gather {}
    r:give()
    r.runtime.advance(0)
    r.runner:stop()
    r.runtime.advance(0)
    assert.same({ 1 }, batches)
    assert.equal(0, r.runner.in_flight)
  end)
end)

describe("a copy that fails", function()
  local function waits_until(what_happens, seconds)
    local disposal = require "moonrabbit.app.disposal"
    local runtime = require("support.virtual_loop").new()
    local errors = require "moonrabbit.errors"
    local d = disposal.new { app = "x", consumer = { queue = "q" },
      publisher = function() return nil, errors.new { kind = "closed", message = "away" } end }
    local message = { headers = {}, properties = {}, exchange = "", routing_key = "q",
      channel = { _runtime = runtime, is_open = function(self) return not self.lost end } }
    local answers = {}
    for i, what in ipairs { "retry", "dead_letter" } do
      runtime.spawn(function()
        local detail = what == "retry" and 5 or "why"
        answers[i] = { d[what](d, message, detail, { message = "no", kind = "error" }, 1) }
      end)
    end
    runtime.advance(20) -- it tries again after 0.5, 1.5, 3.5, 7.5, 15.5 and 31.5 s
    assert.same({}, answers)
    what_happens(d, message)
    runtime.advance(seconds)
    assert.same({ "away", "away" }, { answers[1][2].message, answers[2][2].message })
  end

  it("is waited with no longer when the app stops", function() waits_until(function(d) d:stop() end, 0) end)

  it("is waited with no longer when the broker has taken the original back", function()
    waits_until(function(_, message) message.channel.lost = true end, 1)
  end)
end)

describe("a rate", function()
  it("is kept, with a burst", function()
    local rate = Rate.new({ limit = 10, burst = 3 }, 0)
    for _ = 1, 3 do assert.equal(0, rate:take(1, 0)) end
    assert.is_true(math.abs(rate:take(1, 0) - 0.1) < 1e-9)
    assert.is_true(math.abs(rate:take(1, 0) - 0.2) < 1e-9)
    assert.equal(0, rate:take(1, 100))
    assert.equal(2, rate.tokens)
  end)

  it("holds a consumer back", function()
    local r
    local times = {}
    r = rig.new { rate = { limit = 2, burst = 1 }, handler = function() times[#times + 1] = r.runtime.now() - 1000 end }
    for _ = 1, 5 do r:give() end
    r.runtime.advance(10)
    assert.same({ 0, 0.5, 1, 1.5, 2 }, times)
  end)

  it("gives back what waits when the runner stops", function()
    local r = rig.new { rate = { limit = 0.1, burst = 1 }, handler = function() end }
    r:give()
    local second = r:give()
    r.runtime.advance(1)
    r.runner:stop()
    r.runtime.advance(0)
    assert.equal("nack", second.done)
  end)
end)

describe("a breaker", function()
  it("opens after so many failures within its time", function()
    local b = Breaker.new { failures = 3, within = 10, pause = 5 }
    assert.is_nil(b:result({}, false, 0))
    assert.is_nil(b:result({}, false, 20))
    assert.is_nil(b:result({}, false, 25))
    assert.is_true(b:admit({}, 25))
    assert.equal("open", b:result({}, false, 29))
    assert.equal(5, b:admit({}, 29))
  end)

  it("lets one message try, and closes when that succeeds", function()
    local b = Breaker.new { failures = 1, pause = 5 }
    b:result({}, false, 0)
    local probe = {}
    assert.is_true(b:admit(probe, 5))
    assert.equal("probing", b.state)
    assert.is_number(b:admit({}, 5))
    assert.is_nil(b:result({}, true, 6)) -- one that had begun before
    assert.equal("open", b:result(probe, false, 6))
    assert.is_true(b:admit(probe, 11))
    assert.equal("closed", b:result(probe, true, 11))
    assert.is_true(b:admit({}, 11))
  end)

  it("keeps its state over a reload", function()
    local b = Breaker.new { failures = 1, pause = 5 }
    b:result({}, false, 0)
    local new = Breaker.new { failures = 1, pause = 5 }
    new:restore(b:save())
    assert.equal("open", new.state)
    assert.equal(5, new:admit({}, 0))
  end)

  it("pauses a consumer, and a probe resumes it", function()
    local r
    local broken, runs = true, {}
    r = rig.new { breaker = { failures = 2, pause = 10 }, concurrency = 1, retry = function() return 1 end,
      handler = function()
        runs[#runs + 1] = r.runtime.now() - 1000
        if broken then return nil, "away" end
      end }
    for _ = 1, 6 do r:give() end
    r.runtime.advance(9)
    assert.same({ 0, 0 }, runs)
    r.runtime.advance(2)
    assert.same({ 0, 0, 10 }, runs)
    broken = false
    r.runtime.advance(10)
    assert.same({ 0, 0, 10, 20, 20, 20 }, runs)
    local names = {}
    for i, event in ipairs(r.events) do names[i] = event.name end
    assert.same({ "breaker_open", "breaker_open", "breaker_closed" }, names)
  end)

  it("lets what waits go on as soon as its probe succeeds", function()
    local r
    local broken, runs = true, {}
    r = rig.new { breaker = { failures = 1, pause = 10 }, retry = function() return 60 end, handler = function()
      if broken then return nil, "away" end
      runs[#runs + 1] = r.runtime.now() - 1000
      r.runtime.sleep(0.5)
    end }
    r:handle()
    broken = false
    for _ = 1, 3 do r:give() end
    r.runtime.advance(12)
    assert.same({ 10, 10.5, 10.5 }, runs)
    assert.equal(0, r.runner.in_flight)
  end)

  it("does not end other waits as it closes", function()
    local r
    local broken, tries = true, {}
    r = rig.new { breaker = { failures = 1, pause = 10 }, retry = function() return 30 end, handler = function(msg)
      if broken and not msg.slow then return nil, "away" end
      if not msg.slow then return true end
      tries[#tries + 1] = r.runtime.now() - 1000
      if #tries == 1 then return nil, "once" end
    end }
    function r.disposal.in_process() return true end
    r:handle({ slow = true }, 1)
    broken = false
    r:handle({}, 15)
    assert.equal("closed", r.runner.breaker.state)
    r.runtime.advance(30)
    assert.same({ 0, 30 }, tries)
  end)

  it("counts on over a reload that allows more failures, or fewer", function()
    local old = Breaker.new { failures = 3, within = 100 }
    for t = 1, 5 do assert.is_nil(old:result({}, false, t * 60)) end
    local new = Breaker.new { failures = 5, within = 1000 }
    new:restore(old:save())
    -- The old one remembers three.
    assert.is_nil(new:result({}, false, 310))
    assert.equal("open", new:result({}, false, 320))
    new = Breaker.new { failures = 2, within = 100 }
    new:restore(old:save())
    assert.equal("open", new:result({}, false, 310))
  end)

  for what, batch in pairs { ["a handler that"] = false, ["a batch whose handler"] = { size = 1, wait = 1 } } do
    it("goes on although its probe is " .. what .. " cannot be ended", function()
      local r
      local broken = "fails"
      r = rig.new { breaker = { failures = 1, pause = 5 }, timeout = 2, batch = batch or nil,
        retry = function() return 1 end, handler = function()
          if broken == "fails" then return nil, "away" end
          if broken == "hangs" then r.runtime.sleep(1000) end
        end }
      r.runtime.cancel = nil
      r:handle()
      broken = "hangs"
      r:handle({}, 6)
      assert.equal("probing", r.runner.breaker.state)
      r.runtime.advance(2)
      assert.equal("open", r.runner.breaker.state)
      broken = "no"
      assert.equal("ack", r:handle({}, 6).done)
      assert.equal("closed", r.runner.breaker.state)
    end)
  end

  it("does not count failures that are the message's fault", function()
    local r = rig.new { breaker = { failures = 1 }, handler = function() error(outcome.permanent "bad") end }
    r:handle()
    assert.equal("closed", r.runner.breaker.state)
  end)

  it("gives messages back that it has held too long", function()
    local r = rig.new { breaker = { failures = 1, pause = 100, hold = 30 }, concurrency = 2,
      retry = function() return 1 end, handler = function() return nil, "away" end }
    r:handle()
    local held = r:handle({}, 31)
    assert.equal("nack", held.done)
    assert.equal(0, r.runner.in_flight)
  end)

  it("probes with a batch", function()
    local broken = true
    local r = rig.new { breaker = { failures = 1, pause = 5 }, batch = { size = 2, wait = 1 },
      retry = function() return 1 end, handler = function() if broken then return nil, "away" end end }
    for _ = 1, 2 do r:give() end
    r.runtime.advance(0)
    assert.equal("open", r.runner.breaker.state)
    broken = false
    local a = r:give()
    r:give()
    r.runtime.advance(6)
    assert.equal("ack", a.done)
    assert.equal("closed", r.runner.breaker.state)
  end)
end)
