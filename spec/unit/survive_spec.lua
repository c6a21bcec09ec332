-- What connections that survive are made of: states, backoff, the record of what was declared.
local states = require "moonrabbit.connection.states"
local Backoff = require "moonrabbit.connection.backoff"
local Record = require "moonrabbit.connection.record"

describe("the states of a connection", function()
  it("are all reached from the first one, and all but the last are left", function()
    local reached, left = { [states.first] = true }, {}
    for _, transition in ipairs(states.transitions) do
      local from, event, to = transition[1], transition[2], transition[3]
      assert.is_true(reached[from] or false, from)
      reached[to], left[from] = true, true
      assert.equal(to, states.next(from, event))
    end
    for _, state in ipairs { "connecting", "open", "recovering", "closing", "closed" } do
      assert.is_true(reached[state] or false, state)
      assert.equal(state ~= "closed", left[state] or false, state)
    end
    assert.is_nil(states.next("closed", "connected"))
    assert.is_nil(states.next("open", "gave_up"))
    assert.is_nil(states.next("nowhere", "lost"))
  end)

  it("are drawn in the docs as they are", function()
    local file = assert(io.open "docs/connections.md")
    local page = file:read "*a"
    file:close()
    assert.truthy(page:find("```mermaid\n" .. states.diagram() .. "```\n", 1, true), "run scripts/states-diagram")
    assert.truthy(page:find(states.table(), 1, true), "run scripts/states-diagram")
  end)
end)

describe("the backoff", function()
  local function delays(policy, n, random)
    local backoff, list = Backoff.new(policy, random or function() return 0.5 end), {}
    for i = 1, n do list[i] = backoff:next() or false end
    return list, backoff
  end

  it("grows by its factor up to the longest wait", function()
    assert.same({ 0.1, 0.2, 0.4, 0.8, 1 }, (delays({ max = 1 }, 5)))
    assert.same({ 2, 2, 2 }, (delays({ first = 2, factor = 1 }, 3)))
    assert.same({ 0, 0, 0 }, (delays({ first = 0 }, 3)))
    assert.equal(30, delays({}, 5000)[5000])
  end)

  it("spreads by its jitter", function()
    assert.same({ 8 }, (delays({ first = 10 }, 1, function() return 0 end)))
    assert.same({ 12 }, (delays({ first = 10 }, 1, function() return 1 end)))
    assert.same({ 5 }, (delays({ first = 10, jitter = 0.5 }, 1, function() return 0 end)))
    local seen = {}
    for _ = 1, 100 do
      local delay = Backoff.new({ first = 10, jitter = 0.2 }):next()
      assert.is_true(delay >= 8 and delay <= 12)
      seen[delay] = true
    end
    assert.truthy(next(seen, next(seen)))
  end)

  it("ends after its attempts", function()
    local list, backoff = delays({ attempts = 2 }, 3)
    assert.same({ 0.1, 0.2, false }, list)
    backoff:lasted(5)
    assert.equal(0.1, (backoff:next()))
  end)

  it("starts again only after what it made has lasted", function()
    local _, backoff = delays({ stable = 3 }, 4)
    backoff:lasted(2.9)
    assert.equal(1.6, (backoff:next()))
    backoff:lasted(3)
    local delay, attempt = backoff:next()
    assert.equal(0.1, delay)
    assert.equal(1, attempt)
  end)
end)

describe("the record of what was declared", function()
  local record

  before_each(function() record = Record.new() end)

  local function labels(list)
    local names = {}
    for i, entity in ipairs(list) do names[i] = entity.kind .. " " .. (entity.name or entity.destination) end
    return names
  end

  it("gives everything in its order", function()
    record:bound("queue_binding", "q1", "e2", "key")
    record:queue_declared("q1", { queue = "q1" })
    record:bound("exchange_binding", "e2", "e1", "")
    record:exchange_declared { exchange = "e2", type = "topic" }
    record:exchange_declared { exchange = "e1", type = "topic" }
    record:queue_declared("passive", { queue = "passive", passive = true })
    record:exchange_declared { exchange = "passive", passive = true }
    assert.same({ "exchange e2", "exchange e1", "queue q1", "exchange_binding e2", "queue_binding q1" },
      labels(record:all()))
    assert.same({ "exchange e2", "exchange e1", "queue q1", "exchange_binding e2", "queue_binding q1" },
      labels(record:around "q1"))
    assert.same({}, record:around "other")
  end)

  it("knows a binding by its arguments, in whatever order they come, and keeps a copy", function()
    local arguments = { x = 1, y = { "a", "b" }, z = true }
    record:bound("queue_binding", "q", "e", "k", arguments)
    record:bound("queue_binding", "q", "e", "k", { z = true, y = { "a", "b" }, x = 1 })
    record:bound("queue_binding", "q", "e", "k")
    record:bound("queue_binding", "q", "e", "k", {})
    assert.equal(2, #record:all())
    arguments.x = 2
    record:unbound("queue_binding", "q", "e", "k", { x = 1, y = { "a", "b" }, z = true })
    assert.equal(1, #record:all())
    record:unbound("queue_binding", "q", "e", "k", nil)
    assert.equal(0, #record:all())
    assert.is_nil(next(record.into))
    assert.is_nil(next(record.from))
  end)

  it("forgets with a queue or an exchange what the broker removes with it", function()
    record:exchange_declared { exchange = "auto", type = "topic", auto_delete = true }
    record:exchange_declared { exchange = "e", type = "topic" }
    record:queue_declared("q", { queue = "q" })
    record:bound("queue_binding", "q", "auto", "")
    record:bound("queue_binding", "q", "e", "")
    record:bound("exchange_binding", "auto", "e", "")
    record:queue_deleted "q"
    -- The last binding from `auto` went, so `auto` did, and with it the binding to it.
    assert.same({ "exchange e" }, labels(record:all()))
    record:queue_declared("q", { queue = "q" })
    record:bound("queue_binding", "q", "e", "")
    record:exchange_deleted "e"
    assert.same({ "queue q" }, labels(record:all()))
    assert.is_nil(next(record.bindings))
  end)

  it("forgets an auto-delete queue without consumers, and no other", function()
    record:queue_declared("auto", { queue = "auto", auto_delete = true })
    record:queue_declared("kept", { queue = "kept" })
    record:unused "auto"
    record:unused "kept"
    record:unused "unknown"
    assert.same({ "queue kept" }, labels(record:all()))
  end)

  it("renames a queue wherever it stands", function()
    record:queue_declared("amq.gen-1", { queue = "", exclusive = true })
    record:bound("queue_binding", "amq.gen-1", "e", "key")
    record:bound("queue_binding", "amq.gen-1", "e", "amq.gen-1")
    record:renamed("amq.gen-1", "amq.gen-2")
    local all = record:all()
    assert.same({ "queue amq.gen-2", "queue_binding amq.gen-2", "queue_binding amq.gen-2" }, labels(all))
    assert.equal("key", all[2].routing_key)
    assert.equal("amq.gen-2", all[3].routing_key)
    local method, fields = Record.declaration(all[1])
    assert.equal("queue.declare", method)
    assert.equal("", fields.queue)
    record:queue_deleted "amq.gen-2"
    assert.same({}, record:all())
    assert.is_nil(next(record.from))
  end)
end)
