-- Whatever a script gives an app may wait: handlers, conditions, policies, keys, stores. On PUC Lua 5.1 too, where no
-- yield gets through pcall, an iterator or a metamethod.
local mr = require "moonrabbit"
local rig = require "support.runner_bench"

local route, retry = mr.route, mr.retry
local unpack = rawget(table, "unpack") or rawget(_G, "unpack")

describe("what may wait in an app:", function()
  local r, waited

  before_each(function() r, waited = nil, 0 end)

  -- Waits a second of the rig's and returns its arguments.
  local function slow(...)
    r.runtime.sleep(1)
    waited = waited + 1
    return ...
  end

  local function slowly(...)
    local n, values = select("#", ...), { ... }
    return function() return slow(unpack(values, 1, n)) end
  end

  -- Handles one message with the consumer; its outcomes.
  local function outcomes_of(consumer, fields)
    r = rig.new(consumer)
    local message = r:handle(fields or { headers = { h = 1 }, properties = { type = "t", message_id = "m" },
      body = '{"a":1}' }, 60)
    assert.is_truthy(message.done)
    assert.is_true(waited > 0)
    assert.same({ 0, 0 }, { r.runner.in_flight, r.runner.running })
    return r.outcomes
  end

  local function ok() return true end

  local conditions = {
    ["a predicate"] = function(target) return route.when(slowly(true), target) end,
    ["of a header"] = function(target) return route.header({ h = slowly(true) }, target) end,
    ["of one of the headers"] = function(target) return route.header_any({ g = 1, h = slowly(true) }, target) end,
    ["of a property"] = function(target) return route.property({ type = slowly(true) }, target) end,
    ["of a field"] = function(target) return route.json("a", slowly(true), target) end,
  }
  for name, rule in pairs(conditions) do
    it("a condition, " .. name, function()
      assert.same({ "ok" }, outcomes_of { route = route.first { rule(slowly(true)) } })
      assert.equal(2, waited)
      assert.same({ "ok" }, outcomes_of { route = route.all { rule(slowly(true)), route.key("#", { ok }) } })
      assert.same({ "ok" }, outcomes_of { route = route.first { route.key("#", route.first { rule(ok) }) } })
    end)
  end

  it("targets: handlers, lists, what makes a body, the key of a canary, a rollback", function()
    assert.same({ "ok" }, outcomes_of { handler = slowly() })
    assert.same({ "ok" }, outcomes_of { route = { slowly(), slowly(true), route.all { route.key("#", slowly()) } } })
    assert.same({ "ok" }, outcomes_of { route = route.publish("x", "k", slowly "body") })
    assert.equal("body", r.app.sent[1][1])
    local rolled
    assert.same({ "dead_letter" }, outcomes_of { route = route.canary { stable = ok, candidate = slowly(nil, "worse"),
      weight = 100, sticky = slowly "key", rollback = { error_rate = 0, min = 1 },
      on_rollback = function(report) rolled = slow(report) end } })
    assert.truthy(rolled)
  end)

  it("policies, and what chooses one", function()
    local function fails() return nil, "no" end
    assert.same({ "retry" }, outcomes_of { handler = fails, retry = function() return slow(5) end })
    assert.same({ "dead_letter" }, outcomes_of { handler = fails, retry = function() slow() error "broken" end })
    assert.same({ "retry" }, outcomes_of { handler = fails,
      retry = retry.by_error { { when = slowly(true), retry.constant { delay = 5 } } } })
    assert.same({ "retry" }, outcomes_of { handler = fails,
      retry = setmetatable({}, { __call = function() return slow(5) end }) })
  end)

  it("keys and stores of de-duplication", function()
    local function store(fields)
      local made = { begin = slowly "new", commit = slowly(true), abort = slowly(true) }
      for key, value in pairs(fields or {}) do made[key] = value end
      return made
    end
    assert.same({ "ok" }, outcomes_of { handler = slowly(), dedupe = store() })
    assert.equal(3, waited)
    assert.same({ "ok" }, outcomes_of { handler = ok, dedupe = { store = store(), key = slowly "key" } })
    assert.same({ "dead_letter" }, outcomes_of { handler = slowly(nil, "no"), dedupe = store() })
    assert.same({ "duplicate" }, outcomes_of { handler = ok, dedupe = store { begin = slowly "done" } })
    local moved
    local states = mr.dedupe.state { transitions = { [""] = { "paid" } }, current = slowly(),
      move = function(id, from, to)
        moved = { id, from, to }
        return slow(true)
      end }
    assert.same({ "ok" }, outcomes_of { handler = slowly(),
      dedupe = { store = states, key = states.key(function() return slow("7", "paid") end) } })
    assert.same({ "7", "", "paid" }, moved)
  end)

  it("batches, each with a retry in the process", function()
    local runs = 0
    local consumer = { batch = { size = 1, wait = 1 }, retry = function() return slow(5) end, handler = function()
      runs = runs + 1
      slow()
      if runs == 1 then return nil, "once" end
    end }
    r = rig.new(consumer)
    function r.disposal.in_process() return true end
    assert.equal("ack", r:handle({}, 60).done)
    assert.same({ "retry", "ok" }, r.outcomes)
  end)

  it("a handler whose time is over while it waits in mr.pcall", function()
    r = rig.new { timeout = 5, handler = function()
      local fine, err = mr.pcall(r.runtime.sleep, 1e6)
      assert.is_false(fine)
      error(err, 0)
    end }
    r:handle({}, 10)
    assert.same({ "dead_letter" }, r.outcomes)
    assert.equal("timeout", r.copies[1][4].kind)
  end)
end)
