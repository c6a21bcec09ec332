-- Traces through the real broker: what handlers publish by whatever way, and what becomes of copies.
local broker = require "support.broker"
local mr = require "moonrabbit"

local it = broker.it_unless(it, pending, broker.none()) -- luacheck: ignore 431

local TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
local PARENT = "00-" .. TRACE .. "-00f067aa0ba902b7-01"

describe("traces #app", function()
  local app, names, channel

  before_each(function() app, names, channel = nil, {}, nil end)

  local function name(prefix)
    names[#names + 1] = broker.unique(prefix)
    return names[#names]
  end

  local function start(spec)
    spec.log = function() end
    app = mr.app(spec)
    broker.ok(app:start { consume = broker.connect(), publish = broker.connect() })
    channel = broker.ok(broker.connect():channel { confirm = true })
  end

  after_each(function()
    if app then app:stop(5) end
    if names[1] and broker.url then
      local conn = broker.connect()
      for _, each in ipairs(names) do
        local own = conn:channel()
        own:queue_delete(each)
      end
    end
    broker.close_all()
  end)

  local function publish(queue, headers)
    broker.ok(channel:publish("x", { routing_key = queue, headers = headers, reply_to = names[2] }))
  end

  local function got(queue, n)
    local list = {}
    broker.eventually(function()
      local msg = channel:get(queue, { no_ack = true })
      if msg then list[#list + 1] = msg end
      return #list == n
    end, 20, n .. " messages in " .. queue)
    return list
  end

  it("go along with everything that a handler publishes", function()
    local queue, out = name "q", name "out"
    local own, plain, kept, based, once
    start {
      name = name "app", queues = { [queue] = {}, [out] = {} },
      consumers = { { queue = queue, dead_letter = false, handler = function(msg, me)
        assert(me:publish("app", { routing_key = out }))
        assert(me:forward(msg, "", out))
        assert(own:publish("channel", { routing_key = out, headers = { a = 1 } }))
        assert(own:publish_async("async", { routing_key = out }))
        assert(plain:publish("unconfirmed", { routing_key = out }))
        assert(kept:send "publisher")
        assert(kept:send("with overrides", { headers = { a = 1 } }))
        assert(kept:send_async "publisher async"):wait()
        assert(once:send "once")
        assert(msg:reply "reply")
        assert(based:send "own")
        assert(own:wait_for_confirms())
      end } },
    }
    local conn = broker.connect()
    own, plain = broker.ok(conn:channel { confirm = true }), broker.ok(conn:channel())
    kept = broker.ok(conn:publisher { routing_key = out, headers = { b = 2 } })
    once = broker.ok(conn:publisher { routing_key = out, retry = false })
    based = broker.ok(conn:publisher { routing_key = out, headers = { traceparent = "own" } })
    publish(queue, { traceparent = PARENT, tracestate = "a=1" })
    local list = got(out, 11)
    local parent
    for _, msg in ipairs(list) do
      if msg.body == "own" then
        assert.equal("own", msg.headers.traceparent)
      else
        local found = assert(mr.trace.parse(msg.headers.traceparent), msg.body)
        assert.equal(TRACE, found.trace_id)
        assert.not_equal("00f067aa0ba902b7", found.parent_id)
        parent = parent or found.parent_id
        assert.equal(parent, found.parent_id, msg.body)
        assert.equal("a=1", msg.headers.tracestate, msg.body)
      end
      if msg.body == "with overrides" then assert.same({ 1, 2 }, { msg.headers.a, msg.headers.b }) end
    end
  end)

  it("are not made up, and outside of handlers nothing is added", function()
    local queue, out = name "q", name "out"
    start {
      name = name "app", queues = { [queue] = {}, [out] = {} },
      consumers = { { queue = queue, dead_letter = false, handler = function(_, me)
        assert(me:publish("app", { routing_key = out }))
      end } },
    }
    publish(queue, { other = 1 })
    publish(queue, { traceparent = "00-" .. ("0"):rep(32) .. "-00f067aa0ba902b7-01" })
    publish(out, nil)
    for _, msg in ipairs(got(out, 3)) do assert.is_nil(msg.headers.traceparent) end
  end)

  it("stay in the copies of retries and dead letters, byte for byte", function()
    local queue, parked, id = name "q", name "dead", name "app"
    names[#names + 1], names[#names + 2] = id .. ".orphans", id .. ".wait.200ms"
    local seen = {}
    start {
      name = id, queues = { [queue] = {} },
      consumers = { {
        queue = queue, dead_letter = parked, retry = mr.retry.constant { delay = 0.2, attempts = 2 },
        handler = function(msg)
          seen[#seen + 1] = { msg.headers.traceparent, msg.headers.tracestate }
          return nil, "no"
        end,
      } },
    }
    publish(queue, { traceparent = PARENT, tracestate = "a=1" })
    local letter = got(parked, 1)[1]
    assert.same({ { PARENT, "a=1" }, { PARENT, "a=1" } }, seen)
    assert.same({ PARENT, "a=1" }, { letter.headers.traceparent, letter.headers.tracestate })
  end)

  it("go along with a remote call", function()
    local queue, rpc = name "q", name "rpc"
    local caller, asked, answer
    start {
      name = name "app", queues = { [queue] = {}, [rpc] = {} },
      consumers = {
        { queue = queue, dead_letter = false, handler = function()
          answer = assert(caller:call("?", { routing_key = rpc })).body
        end },
        { queue = rpc, dead_letter = false, handler = function(msg)
          asked = msg.headers.traceparent
          assert(msg:reply "!")
        end },
      },
    }
    caller = broker.connect()
    publish(queue, { traceparent = PARENT })
    broker.eventually(function() return answer end, 10, "an answer")
    assert.equal(TRACE, assert(mr.trace.parse(asked)).trace_id)
  end)
end)
