local failure = require "moonrabbit.app.failure"
local outcome = require "moonrabbit.app.outcome"
local rig = require "support.runner_bench"

describe("a runner", function()
  local function handler(fn, fields)
    local consumer = fields or {}
    consumer.handler = fn
    return rig.new(consumer)
  end

  describe("outcomes", function()
    it("acks after nothing and after true", function()
      local r = handler(function(msg) if msg.yes then return true end end)
      assert.equal("ack", r:handle().done)
      assert.equal("ack", r:handle({ yes = true }).done)
      assert.same({ "ok", "ok" }, r.outcomes)
      assert.same({}, r.copies)
      assert.equal(0, r.runner.in_flight)
      assert.equal(0, r.runner.running)
    end)

    it("gives handlers the message and the app", function()
      local seen
      local r = handler(function(...) seen = { n = select("#", ...), ... } end)
      local msg = r:handle()
      assert.same(2, seen.n)
      assert.equal(msg, seen[1])
      assert.equal(r.app, seen[2])
    end)

    it("asks the policy after nil and an error", function()
      local asked
      local r = handler(function() return nil, "no stock" end, {
        retry = function(msg, err, attempt)
          asked = { msg, err, attempt }
          return 7
        end,
      })
      local msg = r:handle { attempts = 3 }
      assert.equal("ack", msg.done)
      assert.equal(msg, asked[1])
      assert.equal("no stock", asked[2].message)
      assert.equal("error", asked[2].kind)
      assert.equal(3, asked[3])
      assert.same({ "retry", msg, 7, asked[2], 3 }, r.copies[1])
      assert.same({ "retry" }, r.outcomes)
      assert.equal(r.failures[1], asked[2])
    end)

    it("asks the policy after a throw, with the traceback", function()
      local r = handler(function() error "boom" end, { retry = function() return 1 end })
      assert.equal("ack", r:handle().done)
      local err = r.copies[1][4]
      assert.equal("error", err.kind)
      assert.truthy(err.message:find("boom", 1, true))
      if _VERSION ~= "Lua 5.1" or rawget(_G, "jit") then
        assert.truthy(err.traceback:find("app_runner_spec", 1, true))
      end
    end)

    it("keeps tables that are thrown", function()
      local thrown = { message = "custom", code = 7 }
      local r = handler(function() error(thrown) end, { retry = function() return 1 end })
      r:handle()
      assert.equal(thrown, r.copies[1][4].value)
      assert.equal("custom", r.copies[1][4].message)
    end)

    it("fails of anything that can be thrown or returned as an error, and has its place again", function()
      local function bad(meta) return setmetatable({}, meta) end
      local thrown = {
        "text", 42, true, false, {}, function() end, coroutine.create(function() end), io.stdout,
        bad { __tostring = function() error "no text" end }, bad { __tostring = function() return 5 end },
        bad { __index = function() error "no fields" end }, bad { __metatable = 7 }, bad { __metatable = "locked" },
        bad { __tostring = function() error(bad { __tostring = error }) end },
      }
      local n = #thrown
      for i = 1, n + 1 do -- the last one is nil
        for _, fn in ipairs { function() error(thrown[i], 0) end, function() return nil, thrown[i] end } do
          local r = handler(fn, { retry = function() return 1 end, concurrency = 1 })
          assert.equal("ack", r:handle().done)
          assert.equal("retry", r.copies[1][1])
          assert.equal("string", type(r.copies[1][4].message))
          assert.is_false(r.copies[1][4].permanent)
          assert.same({ 0, 0 }, { r.runner.running, r.runner.in_flight })
        end
      end
    end)

    it("fails of a recursion without end", function()
      local function deeper(n) return 1 + deeper(n + 1) end
      local r = handler(function()
        -- Lua 5.4 may collect at the stack's end, where finalizers have no room and fail: objects of other specs would leak.
        collectgarbage "stop"
        deeper(1)
      end, { retry = function() return 1 end })
      finally(function() collectgarbage "restart" end)
      assert.equal("ack", r:handle().done)
      assert.equal("error", r.copies[1][4].kind)
      assert.equal(0, r.runner.running)
    end)

    it("tells for how long a message has been failing in the process", function()
      local seen = {}
      local r = handler(function() return nil, "no" end, { retry = function(_, err, attempt)
        seen[attempt] = err.since
        return attempt < 3 and 10 or nil
      end })
      function r.disposal.in_process() return true end
      r:handle({}, 30)
      assert.same({ 0, 10, 20 }, seen)
      r:handle({}, 0)
      assert.equal(0, seen[1])
    end)

    it("ends retries in the process too when `within` is over", function()
      local r = handler(function() return nil, "no" end, { retry = require "moonrabbit".retry.constant {
        delay = 10, attempts = math.huge, within = 35 } })
      function r.disposal.in_process() return true end
      r:handle({}, 1000)
      assert.same({ "retry", "retry", "retry", "retry", "dead_letter" }, r.outcomes)
    end)

    it("waits here for a retry whose copy has no room in the headers", function()
      local runs = 0
      local r = handler(function()
        runs = runs + 1
        if runs < 3 then return nil, "no" end
      end, { retry = function() return 10 end })
      r.disposal.fails = require "moonrabbit.errors".new { kind = "overflow", temporary = false, message = "no room" }
      local msg = r:handle({}, 19)
      assert.same({ 2, nil }, { runs, msg.done })
      r.runtime.advance(2)
      assert.equal("ack", msg.done)
      assert.same({ "retry", "retry", "ok" }, r.outcomes)
      assert.same({ 1, 2 }, { r.copies[1][5], r.copies[2][5] })
    end)

    it("waits here for a retry whose step turns out to be unusable", function()
      local runs, broken = 0, false
      local r = handler(function()
        runs = runs + 1
        if runs == 1 then return nil, "no" end
      end, { retry = function() return 10 end })
      function r.disposal.in_process() return broken end
      function r.disposal.retry()
        broken = true
        return nil, "somebody declared it otherwise"
      end
      local msg = r:handle({}, 11)
      assert.same({ 2, "ack" }, { runs, msg.done })
      assert.same({ "retry", "ok" }, r.outcomes)
    end)

    it("parks what the policy gives up, and what has none", function()
      local r = handler(function() return nil, "no" end, { retry = function() end })
      assert.equal("ack", r:handle().done)
      assert.same({ "dead_letter", "attempts", "no" }, { r.copies[1][1], r.copies[1][3], r.copies[1][4].message })
      r = handler(function() return nil, "no" end)
      r:handle()
      assert.same({ "dead_letter", "no retry", "no" }, { r.copies[1][1], r.copies[1][3], r.copies[1][4].message })
      assert.same({ "dead_letter" }, r.outcomes)
    end)

    it("parks permanent errors, thrown or returned, without asking", function()
      local asked = 0
      local function policy() asked = asked + 1 return 1 end
      for _, fn in ipairs {
        function() error(outcome.permanent "gone") end, function() return nil, outcome.permanent "gone" end,
        function() return outcome.permanent "gone" end,
      } do
        local r = handler(fn, { retry = policy })
        assert.equal("ack", r:handle().done)
        assert.equal("dead_letter", r.copies[1][1])
        assert.equal("permanent", r.copies[1][3])
        assert.equal("gone", r.copies[1][4].message)
        assert.is_true(r.copies[1][4].permanent)
      end
      assert.equal(0, asked)
    end)

    it("does what an outcome asks for", function()
      local want
      local r = handler(function() return want end, { retry = function() return 5 end })
      want = outcome.retry(9)
      r:handle()
      assert.same({ "retry", 9 }, { r.copies[1][1], r.copies[1][3] })
      want = outcome.retry()
      r:handle()
      assert.same({ "retry", 5 }, { r.copies[2][1], r.copies[2][3] })
      want = outcome.dead_letter "odd"
      r:handle()
      assert.same({ "dead_letter", "odd" }, { r.copies[3][1], r.copies[3][3] })
      want = outcome.drop()
      assert.equal("ack", r:handle().done)
      assert.same({ "retry", "retry", "dead_letter", "drop" }, r.outcomes)
      assert.equal(3, #r.copies)
    end)

    it("fails of an outcome that cannot be", function()
      for _, after in ipairs { -1, 1e9, math.huge, 0 / 0, "5" } do
        local r = handler(function() return outcome.retry(after) end, { retry = function() return 1 end })
        assert.equal("ack", r:handle().done)
        assert.truthy(r.copies[1][4].message:find("outcome.retry: after must be", 1, true), r.copies[1][4].message)
      end
    end)

    it("takes nonsense for a failure that says so", function()
      local cases = {
        { function() return nil end, "a lone nil" },
        { function() return ({}).misspelt end, "a lone nil" },
        { function() return 42 end, "returned 42" },
        { function() return false end, "returned false" },
        { function() return "done" end, "the string 'done'" },
        { function() return {} end, "a table" },
      }
      for _, case in ipairs(cases) do
        local r = handler(case[1], { retry = function() return 1 end })
        assert.equal("ack", r:handle().done)
        assert.equal("nonsense", r.copies[1][4].kind)
        assert.truthy(r.copies[1][4].message:find(case[2], 1, true), r.copies[1][4].message)
      end
    end)

    it("takes nil, nil for a failure without a reason", function()
      local r = handler(function() return nil, nil end)
      r:handle()
      assert.equal("error", r.copies[1][4].kind)
    end)

    it("parks what a policy that throws or returns nonsense was asked about, and says so", function()
      for _, policy in ipairs {
        function() error "broken" end, function() return "soon" end, function() return -1 end,
        function() return 0 / 0 end, function() return math.huge end, function() return 1e9 end,
        function() return false end, function() error(setmetatable({}, { __tostring = error })) end,
      } do
        local r = handler(function() return nil, "no stock" end, { retry = policy })
        assert.equal("ack", r:handle().done)
        assert.same({ "dead_letter", "retry policy" }, { r.copies[1][1], r.copies[1][3] })
        assert.truthy(r.copies[1][4].message:find("the retry policy", 1, true))
        assert.truthy(r.copies[1][4].message:find("no stock", 1, true))
        assert.truthy(r.log[1]:find("the retry policy", 1, true))
      end
    end)

    it("rejects where there is no queue for dead letters", function()
      local r = handler(function() return nil, "no" end, { dead_letter = false })
      assert.equal("reject", r:handle().done)
      assert.same({}, r.copies)
      assert.same({ "dead_letter" }, r.outcomes)
    end)
  end)

  describe("the original", function()
    it("goes back when its copy fails, after a pause, as poison does", function()
      local r = handler(function() return nil, "no" end, { retry = function() return 1 end })
      r.disposal.fails = "no confirm"
      local msg = r:handle()
      assert.is_nil(msg.done)
      r.runtime.advance(1)
      assert.equal("reject", msg.done)
      assert.same({ "requeue" }, r.outcomes)
      assert.equal("copy_failed", r.events[1].name)
    end)

    it("waits longer each time, and not after a copy that was made", function()
      local r = handler(function() return nil, "no" end, { retry = function() return 1 end })
      r.disposal.fails = "no confirm"
      r:handle({}, 1)
      local msg = r:handle({}, 1)
      assert.is_nil(msg.done)
      r.runtime.advance(1)
      assert.equal("reject", msg.done)
      r.disposal.fails = nil
      r:handle()
      r.disposal.fails = "again"
      assert.equal("reject", r:handle({}, 1).done)
    end)

    it("keeps no place for a pause where the broker has taken it back meanwhile: both connections were lost", function()
      for _, what in ipairs { "retry", "dead_letter" } do
        local r = handler(function() return nil, "no" end, { concurrency = 1,
          retry = what == "retry" and function() return 5 end or nil })
        r.disposal[what] = function(_, message)
          message.gone = true
          return nil, "the connection was lost"
        end
        r:handle()
        assert.same({ "requeue" }, r.outcomes)
        assert.equal("closed", r.detail)
        assert.same({ 0, 0, 0 }, { r.runner.in_flight, r.runner.running, r.runner.bad_copies })
        assert.same({}, r.log)
      end
    end)

    it("keeps no place either where the broker takes it back during that pause", function()
      local r = handler(function(msg) if not msg.good then return nil, "no" end end, { concurrency = 1,
        retry = function() return 1 end })
      r.disposal.fails = "no confirm"
      for _ = 1, 5 do r:handle({}, 20) end
      local msg = r:handle({}, 5)
      msg.gone = true
      assert.equal("ack", r:handle({ good = true }, 1).done)
    end)

    it("goes back when making its copy throws", function()
      local r = handler(function() return nil, "no" end, { retry = function() return 1 end })
      function r.disposal.retry() error "a bug" end
      assert.equal("reject", r:handle({}, 2).done)
    end)

    it("is not acked before its copy is safe", function()
      local r = handler(function() return nil, "no" end, { retry = function() return 1 end })
      local confirmed
      function r.disposal.retry()
        r.runtime.sleep(5)
        confirmed = true
        return true
      end
      local msg = r:handle({}, 4)
      assert.is_nil(msg.done)
      r.runtime.advance(1)
      assert.is_true(confirmed)
      assert.equal("ack", msg.done)
    end)
  end)

  describe("a handler that settles its message itself", function()
    it("is left with it: acked once, and warned of once", function()
      local r = handler(function(msg) msg.done = "by the handler" end)
      assert.equal("by the handler", r:handle().done)
      r:handle()
      assert.same({ "ok", "ok" }, r.outcomes)
      assert.equal(1, #r.log)
    end)

    it("and fails then: no copy is made", function()
      local r = handler(function(msg)
        msg.done = "by the handler"
        error "settled before" -- what a second ack throws
      end, { retry = function() return 1 end })
      r:handle()
      assert.same({}, r.copies)
      assert.same({ "drop" }, r.outcomes)
      assert.truthy(r.log[1]:find("settled its message itself", 1, true))
    end)
  end)

  it("makes no copy of a message that the broker has taken back", function()
    local r = handler(function(msg)
      msg.gone = true
      return nil, "no"
    end, { retry = function() return 1 end })
    r:handle()
    assert.same({}, r.copies)
    assert.same({ "requeue" }, r.outcomes)
  end)

  it("does not run again what the broker has taken back while its retry waited", function()
    local runs = 0
    local r = handler(function()
      runs = runs + 1
      return nil, "no"
    end, { retry = function() return 10 end })
    function r.disposal.in_process() return true end
    local msg = r:handle({}, 1)
    msg.gone = true
    r.runtime.advance(20)
    assert.equal(1, runs)
    assert.same({ "retry", "requeue" }, r.outcomes)
    assert.same({ 0, 0 }, { r.runner.in_flight, r.runner.running })
  end)

  it("does not handle what the broker has taken back while it waited for a place", function()
    local r
    local handled = {}
    r = handler(function(msg)
      handled[#handled + 1] = msg.i
      r.runtime.sleep(5)
    end, { concurrency = 1 })
    r:give { i = 1 }
    local second = r:give { i = 2 }
    r:give { i = 3 }
    r.runtime.advance(1)
    second.gone = true
    r.runtime.advance(20)
    assert.same({ 1, 3 }, handled)
    assert.same({ "ok", "requeue", "ok" }, r.outcomes)
    assert.same({ 0, 0 }, { r.runner.in_flight, r.runner.running })
  end)

  it("says why a message went back", function()
    local r = handler(function(msg)
      if msg.opens then return nil, "away" end
    end, { breaker = { failures = 1, pause = 100, hold = 30 }, retry = function() return 1 end })
    r:handle { opens = true }
    r:handle({}, 31)
    assert.equal("the breaker has held it for 30 s", r.detail)
    local gone = r:give()
    r.runtime.advance(1)
    gone.gone = true
    r.runtime.advance(30)
    assert.equal("closed", r.detail)
    r:give()
    r.runtime.advance(1)
    r.runner:stop()
    r.runtime.advance(0)
    assert.equal("stopping", r.detail)
  end)

  describe("concurrency", function()
    it("bounds the handlers that run, in the order in which messages came", function()
      local running, most, order = 0, 0, {}
      local r
      r = handler(function(msg)
        running = running + 1
        most = math.max(most, running)
        order[#order + 1] = msg.i
        r.runtime.sleep(1)
        running = running - 1
      end, { concurrency = 3 })
      for i = 1, 10 do r:give { i = i } end
      r.runtime.advance(10)
      assert.equal(3, most)
      assert.same({ 1, 2, 3, 4, 5, 6, 7, 8, 9, 10 }, order)
      assert.equal(10, r.most)
      assert.equal(0, r.runner.running)
      assert.equal(0, r.runner.in_flight)
    end)

    it("has room again while a retry waits in the process", function()
      local r
      local order = {}
      r = handler(function(msg)
        order[#order + 1] = msg.i
        if msg.i == 1 and #order == 1 then return nil, "once" end
      end, { concurrency = 1, retry = function() return 10 end })
      function r.disposal.in_process() return true end
      r:give { i = 1 }
      r:give { i = 2 }
      r.runtime.advance(1)
      assert.same({ 1, 2 }, order)
      r.runtime.advance(10)
      assert.same({ 1, 2, 1 }, order)
      assert.same({ "retry", "ok", "ok" }, r.outcomes)
    end)
  end)

  it("counts attempts in the process", function()
    local attempts = {}
    local r = handler(function() return nil, "no" end, {
      retry = function(_, err, attempt)
        attempts[#attempts + 1] = attempt
        assert.equal(attempt, err.attempt)
        if attempt < 4 then return 1 end
      end,
    })
    function r.disposal.in_process() return true end
    r:handle({ attempts = 2 }, 10)
    assert.same({ 2, 3, 4 }, attempts)
    assert.equal("dead_letter", r.copies[1][1])
    assert.equal(4, r.copies[1][5])
  end)

  describe("the timeout", function()
    it("cancels a handler that waits for ever, and counts it as failed", function()
      local r
      r = handler(function() r.runtime.sleep(1e6) end, { timeout = 30, retry = function() return 1 end })
      local msg = r:handle({}, 29)
      assert.is_nil(msg.done)
      r.runtime.advance(2)
      assert.equal("ack", msg.done)
      assert.equal("timeout", r.copies[1][4].kind)
      assert.equal(1, #r.copies)
      assert.equal(0, r.runner.running)
      assert.equal(0, r.runner.stuck)
    end)

    it("ignores the late result of a handler that returns all the same", function()
      local r
      r = handler(function()
        pcall(r.runtime.sleep, 1e6)
        return true
      end, { timeout = 30, retry = function() return 1 end })
      if _VERSION == "Lua 5.1" and not rawget(_G, "jit") then return end -- no yield across pcall
      local msg = r:handle({}, 31)
      assert.equal("timeout", r.copies[1][4].kind)
      assert.equal("ack", msg.done)
      assert.same({ "retry" }, r.outcomes)
    end)

    it("leaves a handler to itself that cannot be ended", function()
      local r
      r = handler(function(msg)
        if msg.stuck then
          while not msg.let_go do
            r.runtime.current().cancelling = false
            r.runtime.sleep(5)
          end
        end
      end, { timeout = 30, concurrency = 1, retry = function() return 1 end })
      r.runtime.cancel = function() end
      local msg = r:give { stuck = true }
      local other = r:give {}
      r.runtime.advance(32)
      assert.equal("ack", msg.done)
      assert.equal("timeout", r.copies[1][4].kind)
      assert.equal(1, r.runner.stuck)
      assert.equal("ack", other.done)
      msg.let_go = true
      r.runtime.advance(5)
      assert.equal(0, r.runner.stuck)
      assert.equal(1, #r.copies)
      assert.equal(0, r.runner.in_flight)
      assert.equal(0, r.runner.running)
    end)

    it("leaves it at once where the runtime has no cancel", function()
      local r
      r = handler(function() r.runtime.sleep(100) end, { timeout = 30, retry = function() return 1 end })
      r.runtime.cancel = nil
      local msg = r:handle({}, 30)
      assert.equal("ack", msg.done)
      r.runtime.advance(200)
      assert.same({ "retry" }, r.outcomes)
    end)

    it("of one run is forgotten when the message is run again in the process", function()
      local r
      local runs = 0
      r = handler(function()
        runs = runs + 1
        if runs == 1 then r.runtime.sleep(1e6) end
      end, { timeout = 30, order_by = function() return "key" end, retry = function() return 1 end })
      local msg = r:handle({}, 40)
      assert.equal("ack", msg.done)
      assert.same({ "retry", "ok" }, r.outcomes)
      assert.equal(1, #r.failures)
    end)

    it("is looked at by one task, which ends when nothing runs", function()
      local r
      r = handler(function(msg) r.runtime.sleep(msg.seconds) end, { timeout = 30, retry = function() return 1 end })
      assert.is_true(r.runner.watch.idle)
      r:handle({ seconds = 1 }, 10)
      assert.is_false(r.runner.watch.idle)
      r.runtime.advance(25)
      assert.is_true(r.runner.watch.idle)
      local late = r:handle({ seconds = 29 }, 20)
      local later = r:give { seconds = 100 }
      r.runtime.advance(29)
      assert.same({ "ok", "ok" }, r.outcomes)
      assert.equal("ack", late.done)
      assert.is_nil(later.done)
      r.runtime.advance(1.5)
      assert.same({ "ok", "ok", "retry" }, r.outcomes)
    end)

    it("is each run's own", function()
      local r
      r = handler(function() r.runtime.sleep(20) end, { timeout = 30, concurrency = 2 })
      for _ = 1, 6 do r:give() end
      r.runtime.advance(70)
      assert.same({ "ok", "ok", "ok", "ok", "ok", "ok" }, r.outcomes)
    end)
  end)

  describe("stopping", function()
    it("lets handlers end, and gives back what waits", function()
      local r
      r = handler(function(msg)
        if msg.slow then r.runtime.sleep(5) return end
        return nil, "no"
      end, { retry = function() return 60 end })
      function r.disposal.in_process() return true end
      local slow, waiting = r:give { slow = true }, r:give()
      r.runtime.advance(1)
      r.runner:stop()
      r.runtime.advance(0)
      assert.equal("nack", waiting.done)
      assert.is_nil(slow.done)
      r.runtime.advance(5)
      assert.equal("ack", slow.done)
      assert.equal(0, r.runner.in_flight)
    end)

    it("cancels what is left at the deadline", function()
      local r
      r = handler(function() r.runtime.sleep(100) end, { concurrency = 1 })
      local first, second = r:give(), r:give()
      r.runtime.advance(1)
      r.runner:abort()
      r.runtime.advance(0)
      assert.equal("nack", first.done)
      assert.equal("nack", second.done)
      assert.equal("nack", r:handle().done)
      assert.equal(0, r.runner.in_flight)
    end)
  end)

  describe("de-duplication", function()
    local function store(states)
      local self = { calls = {}, states = states or {} }
      function self.begin(s, key, lease)
        s.calls[#s.calls + 1] = "begin " .. key
        s.lease = lease
        if s.away then return nil, "no redis" end
        local state = s.states[key] or "new"
        if state == "new" then s.states[key] = "running" end
        return state
      end
      function self.commit(s, key)
        s.calls[#s.calls + 1] = "commit " .. key
        if s.away then return nil, "no redis" end
        s.states[key] = "done"
        return true
      end
      function self.abort(s, key)
        s.calls[#s.calls + 1] = "abort " .. key
        s.states[key] = nil
        return true
      end
      return self
    end

    local function id(key) return { properties = { message_id = key } } end

    it("handles a key once, and acks duplicates", function()
      local s, handled = store(), 0
      local r = handler(function() handled = handled + 1 end, { dedupe = s })
      r:handle(id "a")
      assert.equal("ack", r:handle(id "a").done)
      assert.equal(1, handled)
      assert.same({ "ok", "duplicate" }, r.outcomes)
      assert.same({ "begin a", "commit a", "begin a" }, s.calls)
    end)

    it("gives the store its runtime, and a key that it refuses to the dead letters", function()
      local s = store { a = "refused" }
      local runtime
      function s.attach(_, given) runtime = given end
      local handled = 0
      local r = handler(function() handled = handled + 1 end, { dedupe = s, retry = function() return 1 end })
      assert.is_function(runtime.now)
      r:handle(id "a")
      assert.equal(0, handled)
      assert.same({ "dead_letter" }, r.outcomes)
    end)

    it("hands over what a store in this process knows", function()
      local memory = require "moonrabbit.app.dedupe.memory"
      local old = handler(function() end, { dedupe = memory.new() })
      old:handle(id "a")
      local handled = 0
      local new = handler(function() handled = handled + 1 end, { dedupe = { store = memory.new() } })
      new.runner:restore(old.runner:state())
      new:handle(id "a")
      new:handle(id "b")
      assert.equal(1, handled)
      assert.same({ "duplicate", "ok" }, new.outcomes)
    end)

    it("commits before the ack", function()
      local s = store()
      local r = handler(function() end, { dedupe = s })
      local msg = id "a"
      local commit = s.commit
      function s.commit(...)
        assert.is_nil(msg.done)
        return commit(...)
      end
      r:handle(msg)
      assert.equal("ack", msg.done)
    end)

    it("takes its key from a header or a function", function()
      local s = store()
      handler(function() end, { dedupe = { store = s, key = "header:order" } }):handle { headers = { order = 17 } }
      handler(function() end, { dedupe = { store = s, key = function(m) return m.body end } }):handle { body = "b" }
      assert.same({ "begin 17", "commit 17", "begin b", "commit b" }, s.calls)
    end)

    it("lets go of the key of what failed, before its copy is made", function()
      local s = store()
      local r = handler(function() return nil, "no" end, { dedupe = s, retry = function() return 1 end })
      r:handle(id "a")
      assert.same({ "begin a", "abort a" }, s.calls)
      assert.equal("retry", r.copies[1][1])
    end)

    it("keeps the key during a retry in the process", function()
      local s, n = store(), 0
      local r = handler(function()
        n = n + 1
        if n == 1 then return nil, "no" end
      end, { dedupe = s, retry = function() return 1 end })
      function r.disposal.in_process() return true end
      r:handle(id "a", 2)
      assert.same({ "begin a", "commit a" }, s.calls)
    end)

    it("waits for a key that somebody else has, without a place", function()
      local s = store { a = "running" }
      local r = handler(function() end, { dedupe = s, concurrency = 1 })
      local msg = r:handle(id "a", 1)
      assert.is_nil(msg.done)
      assert.equal("ack", r:handle(id "b").done)
      s.states.a = "done"
      r.runtime.advance(2)
      assert.equal("ack", msg.done)
      assert.same({ "ok", "duplicate" }, r.outcomes)
    end)

    it("waits for a store that is away, and handles nothing meanwhile", function()
      local s, handled = store(), 0
      local r = handler(function() handled = handled + 1 end, { dedupe = s })
      s.away = true
      local msg = r:handle(id "a", 10)
      assert.equal(0, handled)
      assert.is_nil(msg.done)
      assert.equal(1, #r.log)
      s.away = false
      r.runtime.advance(3)
      assert.equal(1, handled)
      assert.equal("ack", msg.done)
    end)

    it("waits to commit, too: what was handled is not forgotten", function()
      local s = store()
      local r = handler(function() s.away = true end, { dedupe = s })
      local msg = r:handle(id "a", 10)
      assert.is_nil(msg.done)
      s.away = false
      r.runtime.advance(3)
      assert.equal("ack", msg.done)
      assert.equal("done", s.states.a)
    end)

    it("goes on without the store where it is told to, and says so", function()
      local s = store()
      s.away = true
      local r = handler(function() end, { dedupe = { store = s, away = "go_on" } })
      assert.equal("ack", r:handle(id "a").done)
      assert.truthy(r.log[1]:find("duplicates may be handled", 1, true))
      assert.equal("dedupe_away", r.events[1].name)
    end)

    it("survives a store that throws", function()
      local s = store()
      local begin = s.begin
      function s.begin() error "bug" end
      local r = handler(function() end, { dedupe = s })
      local msg = r:handle(id "a", 1)
      assert.is_nil(msg.done)
      s.begin = begin
      r.runtime.advance(3)
      assert.equal("ack", msg.done)
    end)

    it("handles a message without a key, or fails it", function()
      local s = store()
      assert.equal("ack", handler(function() end, { dedupe = s }):handle().done)
      assert.same({}, s.calls)
      local r = handler(function() end, { dedupe = { store = s, missing = "fail" } })
      r:handle()
      assert.equal("dead_letter", r.copies[1][1])
    end)

    it("takes no key that is empty, and fails of one that is neither text nor number", function()
      local s = store()
      assert.equal("ack", handler(function() end, { dedupe = s }):handle(id "").done)
      assert.equal("ack", handler(function() end, { dedupe = s }):handle(id "").done)
      assert.same({}, s.calls)
      for _, key in ipairs { {}, true, print } do
        local r = handler(function() end, { dedupe = { store = s, key = function() return key end },
          retry = function() return 1 end })
        assert.equal("ack", r:handle().done)
        assert.equal("retry", r.copies[1][1])
        assert.truthy(r.copies[1][4].message:find("no string or number", 1, true), r.copies[1][4].message)
      end
      local r = handler(function() end, { dedupe = { store = s, key = function() error "no such field" end } })
      r:handle()
      assert.truthy(r.copies[1][4].message:find "the de%-duplication key: .*no such field")
      assert.same({}, s.calls)
    end)

    it("gives the key back during a wait that its lease does not outlast, and looks again afterwards", function()
      local memory = require "moonrabbit.app.dedupe.memory"
      local runs = 0
      local r = handler(function(msg)
        runs = runs + 1
        if msg.fails then return nil, "no" end
      end, { dedupe = memory.new(), timeout = 30, retry = function() return 400 end })
      function r.disposal.in_process() return true end
      local first = id "a"
      first.fails = true
      r:handle(first, 350)
      assert.equal("ack", r:handle(id "a").done) -- published twice, and handled
      r.runtime.advance(60)
      assert.equal("ack", first.done)
      assert.same({ "retry", "ok", "duplicate" }, r.outcomes)
      assert.equal(2, runs)
    end)

    it("has a lease that outlasts the hold of a breaker", function()
      local memory = require "moonrabbit.app.dedupe.memory"
      local runs = 0
      local r
      r = handler(function(msg)
        if msg.opens then return nil, "away" end
        runs = runs + 1
        r.runtime.sleep(50)
      end, { dedupe = memory.new(), timeout = 60, breaker = { failures = 1, pause = 280 },
        retry = function() return 1 end })
      r:handle { opens = true }
      local first = r:handle(id "a", 310)
      local second = r:handle(id "a", 60)
      assert.same({ "ack", "ack", 1 }, { first.done, second.done, runs })
    end)

    it("retries a key that cannot be made as the policy says, in the process too", function()
      local s, attempts = store(), {}
      local r
      r = handler(function() end, {
        dedupe = { store = s, key = function(msg) return r.runtime.now() < 1008 and msg.no.field or "a" end },
        retry = function(_, _, attempt)
          attempts[#attempts + 1] = attempt
          return 5
        end,
      })
      function r.disposal.in_process() return true end
      local msg = r:handle({}, 4)
      assert.is_nil(msg.done)
      r.runtime.advance(7)
      assert.equal("ack", msg.done)
      assert.same({ 1, 2 }, attempts)
      assert.same({ "retry", "retry", "ok" }, r.outcomes)
      assert.equal(0, r.runner.in_flight)
    end)

    it("gives up a key that can never be made", function()
      local r = handler(function() end, {
        dedupe = { store = store(), key = function(msg) return msg.no.field end }, batch = { size = 1, wait = 1 },
        retry = function(_, _, attempt) return attempt < 3 and 1 or nil end,
      })
      function r.disposal.in_process() return true end
      r:handle({}, 10)
      assert.same({ "retry", "retry", "dead_letter" }, r.outcomes)
      assert.equal(0, r.runner.in_flight)
    end)

    describe("by a store that has joined the handler's transaction", function()
      -- What handlers write becomes true with the commit, or not at all.
      local function joined()
        local s = store()
        s.joined, s.open, s.written, s.commits = true, {}, {}, 0
        local begin = s.begin
        function s.begin(...)
          s.open = {}
          return begin(...)
        end
        function s.commit(self, key)
          self.commits = self.commits + 1
          if self.fails then
            local why = self.fails
            self.states[key], self.open, self.fails = nil, {}, self.goes_on_failing and why or nil
            return nil, why
          end
          for _, each in ipairs(self.open) do self.written[#self.written + 1] = each end
          self.states[key] = "done"
          return true
        end
        return s
      end

      it("writes nothing of an attempt that failed", function()
        local s, runs = joined(), 0
        local r = handler(function()
          runs = runs + 1
          s.open[#s.open + 1] = "run " .. runs
          if runs == 1 then return nil, "no" end
        end, { dedupe = s, retry = function() return 5 end })
        function r.disposal.in_process() return true end
        local msg = r:handle(id "a", 1)
        assert.same({ "begin a", "abort a" }, s.calls) -- no transaction is open while it waits
        r.runtime.advance(5)
        assert.equal("ack", msg.done)
        assert.same({ "run 2" }, s.written)
        assert.same({ "retry", "ok" }, r.outcomes)
      end)

      it("does not ack what its commit has undone: that is a failure", function()
        local s, runs = joined(), 0
        s.fails = "a deferred constraint"
        local r = handler(function()
          runs = runs + 1
          s.open[#s.open + 1] = "run " .. runs
        end, { dedupe = s, retry = function() return 5 end })
        local msg = r:handle(id "a")
        assert.same({ "retry" }, r.outcomes)
        assert.equal("the transaction was not committed: a deferred constraint", r.copies[1][4].message)
        assert.same({}, s.written)
        assert.equal("ack", msg.done) -- its copy waits on the ladder
        assert.equal("ack", r:handle(id "a").done)
        assert.same({ "run 2" }, s.written)
      end)

      it("handles once more what was undone while the database was away", function()
        local s, runs = joined(), 0
        local r
        r = handler(function()
          runs = runs + 1
          s.open[#s.open + 1] = "run " .. runs
          if runs == 1 then s.away, s.fails = true, "the connection is lost" end
        end, { dedupe = s, concurrency = 1 })
        local msg = r:handle(id "a", 10)
        assert.same({ 1, nil, {} }, { runs, msg.done, r.outcomes })
        s.away = false
        r.runtime.advance(3)
        assert.equal("ack", msg.done)
        assert.same({ "run 2" }, s.written)
        assert.same({ "ok" }, r.outcomes)
      end)

      it("gives it back when the app stops meanwhile, and does not ack it", function()
        local s = joined()
        local r = handler(function() s.away, s.fails = true, "the connection is lost" end, { dedupe = s })
        local msg = r:handle(id "a", 10)
        r.runner:stop()
        r.runtime.advance(1)
        assert.equal("nack", msg.done)
        assert.same({ "requeue" }, r.outcomes)
      end)

      it("acks where only the answer to the commit was lost", function()
        local s, runs = joined(), 0
        local r = handler(function() runs = runs + 1 end, { dedupe = s })
        local commit = s.commit
        function s.commit(...)
          commit(...)
          return nil, "the answer was lost"
        end
        assert.equal("ack", r:handle(id "a").done)
        assert.equal(1, runs)
        assert.same({ "ok" }, r.outcomes)
      end)

      it("runs one handler at a time, and goes with no batch", function()
        local s = joined()
        assert.equal(1, handler(function() end, { dedupe = s }).runner.limit)
        assert.equal(4, handler(function() end, { dedupe = s, concurrency = 4 }).runner.limit)
        assert.error_matches(function()
          handler(function() end, { dedupe = { store = s }, batch = { size = 2, wait = 1 } })
        end, "exclude each other")
      end)
    end)

    it("gives back what waits for a key when it stops", function()
      local r = handler(function() end, { dedupe = store { a = "running" } })
      local msg = r:handle(id "a", 1)
      r.runner:stop()
      r.runtime.advance(0)
      assert.equal("nack", msg.done)
    end)
  end)

  it("says what policies are given", function()
    assert.equal("x", tostring(failure.new("error", "x")))
  end)
end)
