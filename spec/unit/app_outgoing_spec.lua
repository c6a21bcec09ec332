-- The channels that an app publishes on, with made-up ones, on a clock of the spec's.
local Outgoing = require "moonrabbit.app.outgoing"

describe("an app's channels", function()
  local clock, made, spawned, outgoing

  local function channel()
    local self = { open = true, waited = false }
    function self.is_open() return self.open end
    function self.close() self.open = false end
    function self.wait_for_confirms() self.waited = self.open return true end
    return self
  end

  before_each(function()
    clock, made, spawned = 100, {}, {}
    local runtime = {
      now = function() return clock end,
      spawn = function(fn, ...) table.insert(spawned, { fn, ... }) end,
    }
    outgoing = Outgoing.new(runtime, { channel = function()
      made[#made + 1] = channel()
      return made[#made]
    end })
  end)

  local function refused(times, kind)
    for _ = 1, times do
      local current = outgoing:channel "routes"
      outgoing:heard("routes", current, nil, { kind = kind or "nacked" })
    end
  end

  local function run_tasks()
    for _, task in ipairs(spawned) do task[1](task[2]) end
    spawned = {}
  end

  it("are one for each purpose, and another when one is gone", function()
    local one = outgoing:channel "routes"
    assert.equal(one, outgoing:channel "routes")
    assert.not_equal(one, outgoing:channel "copies")
    one.open = false
    assert.not_equal(one, outgoing:channel "routes")
    assert.equal(3, #made)
  end)

  it("are left after three refusals, and closed once what is under way is settled", function()
    refused(2)
    assert.equal(1, #made)
    refused(1)
    local other = outgoing:channel "routes"
    assert.equal(made[2], other)
    assert.is_true(made[1].open)
    run_tasks()
    assert.is_true(made[1].waited)
    assert.is_false(made[1].open)
    assert.is_true(other.open)
  end)

  it("are left ever more seldom", function()
    local left_at = {}
    for i = 1, 4000 do
      local before = outgoing:channel "routes"
      refused(1)
      if outgoing:channel "routes" ~= before then left_at[#left_at + 1] = i / 10 end
      clock = clock + 0.1
    end
    assert.truthy(#left_at >= 8 and #left_at <= 14, #left_at)
    assert.truthy(left_at[#left_at] - left_at[#left_at - 1] >= 59)
  end)

  it("are not left for refusals that are long ago", function()
    for _ = 1, 10 do
      refused(2)
      clock = clock + 601
    end
    assert.equal(1, #made)
    refused(2)
    clock = clock + 599
    refused(1)
    outgoing:channel "routes"
    assert.equal(2, #made)
  end)

  it("are not left for what is no refusal, nor for one by a channel that was left", function()
    refused(10, "timeout")
    refused(10, "unroutable")
    assert.equal(1, #made)
    refused(3)
    outgoing:channel "routes"
    for _ = 1, 10 do outgoing:heard("routes", made[1], nil, { kind = "nacked" }) end
    clock = clock + 1
    for _ = 1, 10 do outgoing:heard("routes", made[2], true) end
    assert.equal(made[2], outgoing:channel "routes")
  end)
end)
