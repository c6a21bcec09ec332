-- moonrabbit topology plan and apply.
local broker = require "support.broker"
local life = require "support.life"
local process = require "support.process"

local script = [[
local mr = require "moonrabbit"
return mr.app {
  name = "$NAME",
  exchanges = { ["$NAME.x"] = { type = "topic" } },
  queues = { ["$QUEUE"] = { bind = { { "$NAME.x", "order.#" } } } },
  consumers = { { queue = "$QUEUE", handler = function() end, retry = mr.retry.steps { 5 } } },
}
]]

describe("moonrabbit topology", function()
  local it = broker.it_unless(it, pending, broker.none())
  local bench, ch

  before_each(function()
    bench = life.new()
    bench:write("app.lua", script)
    ch = broker.ok(broker.connect():channel())
  end)

  after_each(function()
    bench:stop()
    bench:clean(".x", ".wait.5s")
  end)

  local function topology(...)
    local words = { "bin/moonrabbit", "topology", ... }
    table.insert(words, 4, bench:path "app.lua")
    return process.run(words, { env = { AMQP_URL = broker.url } })
  end

  it("plans without changing anything, and applies", function()
    local plan = topology "plan"
    assert.equal(0, plan.code, plan.err)
    assert.truthy(plan.out:find("+ queue    " .. bench.queue, 1, true), plan.out)
    assert.truthy(plan.out:find("+ queue    " .. bench.name .. ".wait.5s", 1, true), plan.out)
    assert.equal(1, topology("plan", "--check").code)
    local there = ch:queue_declare(bench.queue, { passive = true })
    assert.is_nil(there)
    assert.equal(0, topology("apply").code)
    assert.equal(0, topology("plan", "--check").code)
    local again = topology "apply"
    assert.equal(0, again.code)
    assert.truthy(again.out:find(" 0 missing", 1, true), again.out)
  end)

  it("changes nothing at all where something is there with other properties", function()
    broker.ok(ch:queue_declare(bench.queue, { durable = true, arguments = { ["x-max-length"] = 5 } }))
    local plan = topology "plan"
    assert.truthy(plan.out:find("! queue    " .. bench.queue, 1, true), plan.out)
    assert.truthy(plan.out:find("x-max-length", 1, true), plan.out)
    assert.equal(1, topology("plan", "--check").code)
    local applied = topology "apply"
    assert.equal(1, applied.code)
    assert.truthy(applied.err:find("nothing was changed", 1, true))
    assert.is_nil((ch:exchange_declare(bench.name .. ".x", { passive = true })))
  end)

  it("warns of what would disturb retries: limits in the script, policies in the broker", function()
    assert.equal("", topology("plan").err)
    local limited = "type = 'quorum', arguments = { ['x-delivery-limit'] = 3 }, bind = {"
    bench:write("app.lua", (script:gsub("bind = {", limited)))
    local plan = topology "plan"
    assert.equal(0, plan.code)
    assert.truthy(plan.err:find("gives a message up after 3 returns", 1, true), plan.err)
    local url = os.getenv "AMQP_MANAGEMENT_URL"
    if not url then return end
    bench:write("app.lua", script)
    assert.equal(0, topology("apply").code)
    local api = broker.management()
    broker.ok(api:set_policy("/", bench.name, { pattern = "^" .. bench.name:gsub("%p", "."), apply_to = "queues",
      definition = { ["message-ttl"] = 1000 } }))
    finally(function() api:delete_policy("/", bench.name) end)
    broker.eventually(function()
      plan = topology("plan", "--management", url)
      return plan.err:find(bench.name .. ".wait.5s", 1, true)
    end, 20, "the policy is seen")
    assert.truthy(plan.err:find("message-ttl", 1, true), plan.err)
    assert.equal(0, plan.code)
  end)

  it("sees bindings by the management API, and repeats no password", function()
    local url = os.getenv "AMQP_MANAGEMENT_URL"
    if not url then return pending "needs AMQP_MANAGEMENT_URL" end
    assert.equal(0, topology("apply").code)
    assert.equal(0, topology("plan", "--check", "--management", url).code)
    broker.ok(ch:queue_unbind(bench.queue, bench.name .. ".x", "order.#"))
    local plan = topology("plan", "--check", "--management", url)
    assert.equal(1, plan.code)
    assert.truthy(plan.out:find("+ binding  " .. bench.queue, 1, true), plan.out)
    local bad = topology("plan", "--management", "http://guest:open-sesame@127.0.0.1:1")
    assert.equal(1, bad.code)
    assert.is_nil((bad.err .. bad.out):find("open-sesame", 1, true))
  end)
end)
