local Window = require "moonrabbit.app.route.window"
local rig = require "support.runner_bench"
local route = require "moonrabbit.app.route"

local function canary_of(spec)
  spec.stable = spec.stable or function() end
  spec.candidate = spec.candidate or function() end
  return route.canary(spec).canary
end

local function message(headers) return { headers = headers or {}, properties = {}, routing_key = "k" } end

describe("a sliding window", function()
  it("counts what is within it", function()
    local w = Window.new(10)
    for t = 0, 19 do w:add(t % 2 == 0, 0.01, t) end
    assert.equal(10, w.count)
    assert.equal(5, w.failures)
    assert.equal(0.5, w:error_rate())
    w:advance(100)
    assert.equal(0, w.count)
    assert.equal(0, w:error_rate())
    assert.is_nil(next(w.times))
  end)

  it("knows quantiles to a fifth", function()
    local w = Window.new(10)
    for i = 1, 100 do w:add(true, i / 1000, 0) end
    assert.is_true(w:quantile(0.95) >= 0.095 and w:quantile(0.95) < 0.095 * 1.2)
    assert.equal(0, Window.new(10):quantile(0.95))
  end)
end)

describe("a canary", function()
  it("gets its share", function()
    local i = 0
    local c = canary_of { weight = 10, random = function() i = i + 1 return (i % 100) / 100 end }
    local n = 0
    for _ = 1, 1000 do if c:choose(message()) == "candidate" then n = n + 1 end end
    assert.equal(100, n)
    assert.equal("stable", canary_of({ weight = 0 }):choose(message()))
    assert.equal("candidate", canary_of({ weight = 100 }):choose(message()))
  end)

  it("is sticky by a key: a header's or a function's", function()
    local c = canary_of { name = "v2", weight = 20, sticky = "customer" }
    local n = 0
    for i = 1, 5000 do
      local version = c:choose(message { customer = "c" .. i })
      assert.equal(version, c:choose(message { customer = "c" .. i }))
      if version == "candidate" then n = n + 1 end
    end
    assert.is_true(n > 800 and n < 1200, n)
    assert.equal("stable", c:choose(message()))
    local f = canary_of { name = "v2", weight = 20, sticky = function(m) return m.headers.customer end }
    assert.equal(c:choose(message { customer = 7 }), f:choose(message { customer = 7 }))
  end)

  it("is rolled back when it fails more often, and only then", function()
    local c = canary_of { weight = 10, rollback = { error_rate = 0.05, min = 100 } }
    for i = 1, 900 do c:record("stable", i % 50 ~= 0, 0.01, 1) end
    for i = 1, 99 do assert.is_nil(c:record("candidate", i % 10 ~= 0, 0.01, 1)) end
    local report = c:record("candidate", false, 0.01, 1)
    assert.equal(100, report.candidate.count)
    assert.equal(10, report.candidate.failures)
    assert.truthy(report.reason:find("10.0 %", 1, true))
    assert.equal("stable", c:choose(message()))
    assert.is_nil(c:record("candidate", false, 0.01, 1))
    local good = canary_of { weight = 10, rollback = { error_rate = 0.05, min = 10 } }
    for i = 1, 500 do
      good:record("stable", i % 5 ~= 0, 0.01, 1) -- both suffer from the same
      assert.is_nil(good:record("candidate", i % 5 ~= 0, 0.01, 1))
    end
  end)

  it("is rolled back when it is slower", function()
    local c = canary_of { weight = 10, rollback = { latency = 2, min = 50 } }
    for _ = 1, 200 do c:record("stable", true, 0.01, 1) end
    local report
    for _ = 1, 50 do report = c:record("candidate", true, 0.05, 1) end
    assert.truthy(report.reason:find("95 %", 1, true))
  end)

  it("forgets what is older than the window", function()
    local c = canary_of { weight = 10, window = 60, rollback = { error_rate = 0.05, min = 10 } }
    for _ = 1, 9 do c:record("candidate", false, 0.01, 0) end
    assert.is_nil(c:record("candidate", false, 0.01, 1000))
  end)

  it("keeps its state over a reload, as long as it is the same", function()
    local c = canary_of { name = "v2", version = "1", weight = 50, rollback = { error_rate = 0.1, min = 1 } }
    c:record("candidate", false, 0.01, 1)
    local same = canary_of { name = "v2", version = "1", weight = 50 }
    assert.is_true(same:restore(c:state()))
    assert.truthy(same.rolled_back)
    local mended = canary_of { name = "v2", version = "2", weight = 50 }
    assert.is_false(mended:restore(c:state()))
    assert.is_false(mended.rolled_back)
  end)

  it("is told of its runs, timeouts included, and of its end", function()
    local rolled, seen = nil, {}
    local r
    r = rig.new {
      timeout = 5, retry = function() return 1 end,
      route = route.first { route.otherwise(route.canary {
        name = "v2", weight = 100, stable = function() seen[#seen + 1] = "stable" end,
        candidate = function(msg)
          seen[#seen + 1] = "candidate"
          if msg.slow then r.runtime.sleep(100) end
        end,
        rollback = { error_rate = 0.3, min = 3 }, on_rollback = function(report) rolled = report end,
      }) },
    }
    r:handle()
    r:handle({}, 1)
    assert.same({ "v2", "candidate", true, 0 }, r.canaries[1])
    r:handle({ slow = true }, 6)
    assert.same({ "v2", "candidate", false, 5 }, r.canaries[3])
    assert.equal("canary_rollback", r.events[1].name)
    assert.equal("v2", r.events[1].fields.route)
    r.runtime.advance(0)
    assert.equal(rolled, r.events[1].fields)
    r:handle()
    assert.same({ "candidate", "candidate", "candidate", "stable" }, seen)
  end)

  it("in a list keeps its version while its message is retried in the process, and counts each run once", function()
    local chances, seen = { 0, 0.9, 0, 0.9 }, {}
    local function random() return table.remove(chances, 1) end
    local r = rig.new {
      retry = function() return 1 end,
      route = { function() end, route.canary { name = "v2", weight = 50, random = random,
        stable = function() seen[#seen + 1] = "stable" end,
        candidate = function()
          seen[#seen + 1] = "candidate"
          if #seen < 3 then return nil, "no" end
        end,
      } },
    }
    function r.disposal.in_process() return true end
    assert.equal("ack", r:handle({}, 5).done)
    assert.same({ "candidate", "candidate", "candidate" }, seen)
    assert.equal(3, #r.canaries)
  end)

  it("refuses senseless options", function()
    local function mistake(expected, spec)
      local ok, err = pcall(canary_of, spec)
      assert.is_false(ok)
      assert.truthy(err:find(expected, 1, true), err)
    end
    mistake("the weight is missing", {})
    mistake("0 to 100", { weight = 101 })
    mistake("0 to 100", { weight = -1 })
    mistake("a share from 0 to 1", { weight = 1, rollback = { error_rate = 5 } })
    mistake("neither error_rate nor latency", { weight = 1, rollback = { min = 5 } })
    mistake("did you mean 'rollback'", { weight = 1, rolback = {} })
    mistake("over 0", { weight = 1, window = 0 })
    assert.has_error(function() route.canary { stable = function() end, weight = 1 } end)
  end)
end)
