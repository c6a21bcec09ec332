-- W3C trace context: what counts as a trace, and what of an app's publishes carries it. No broker.
local mr = require "moonrabbit"
local testing = mr.testing
local trace = mr.trace

local TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
local PARENT = "00-" .. TRACE .. "-00f067aa0ba902b7-01"

describe("trace.parse", function()
  it("takes a traceparent apart", function()
    assert.same({ trace_id = TRACE, parent_id = "00f067aa0ba902b7", flags = 1 }, trace.parse(PARENT))
    assert.equal(0, trace.parse("00-" .. TRACE .. "-00f067aa0ba902b7-00").flags)
    assert.equal(3, trace.parse("00-" .. TRACE .. "-00f067aa0ba902b7-ff").flags)
  end)

  it("reads what version 00 has of versions to come", function()
    assert.equal(TRACE, trace.parse("cc" .. PARENT:sub(3)).trace_id)
    assert.equal(TRACE, trace.parse("cc" .. PARENT:sub(3) .. "-what.the.future.brings").trace_id)
    assert.is_nil(trace.parse("cc" .. PARENT:sub(3) .. "."))
  end)

  it("takes nothing else for one", function()
    for _, text in ipairs {
      "", "00", PARENT:upper(), PARENT .. "-00", PARENT .. "x", " " .. PARENT, PARENT:sub(1, -2), "ff" .. PARENT:sub(3),
      "00-" .. ("0"):rep(32) .. "-00f067aa0ba902b7-01", "00-" .. TRACE .. "-" .. ("0"):rep(16) .. "-01",
      "00-" .. TRACE:sub(2) .. "-00f067aa0ba902b7a-01", "00_" .. PARENT:sub(4), PARENT:sub(1, -3) .. "0g",
      "0g" .. PARENT:sub(3), ("x"):rep(55), PARENT:sub(1, 54) .. "\0",
    } do
      assert.is_nil(trace.parse(text), text)
    end
    assert.is_nil(trace.parse(nil))
    assert.is_nil(trace.parse {})
    assert.is_nil(trace.parse(17))
  end)
end)

describe("trace.of", function()
  local function message(headers) return { headers = headers } end

  it("keeps the trace and gives a parent id of its own, the same each time", function()
    local msg = message { traceparent = PARENT, tracestate = "a=1,b=2" }
    local first, second = trace.of(msg), trace.of(msg)
    local parsed = trace.parse(first.traceparent)
    assert.equal(TRACE, parsed.trace_id)
    assert.not_equal("00f067aa0ba902b7", parsed.parent_id)
    assert.equal(1, parsed.flags)
    assert.equal("a=1,b=2", first.tracestate)
    assert.same(first, second)
    assert.not_equal(first, second)
    assert.not_equal(first.traceparent, trace.of(message { traceparent = PARENT }).traceparent)
  end)

  it("speaks version 00, with the flags that it knows", function()
    local found = trace.of(message { traceparent = "cc-" .. TRACE .. "-00f067aa0ba902b7-ff-more" })
    assert.truthy(found.traceparent:match("^00%-" .. TRACE .. "%-%x+%-03$"), found.traceparent)
  end)

  it("gives ids that differ", function()
    local seen = {}
    for _ = 1, 1000 do
      local id = trace.parse(trace.of(message { traceparent = PARENT }).traceparent).parent_id
      assert.is_nil(seen[id])
      seen[id] = true
    end
  end)

  it("ignores what is no trace", function()
    assert.is_nil(trace.of(message {}))
    assert.is_nil(trace.of(message { traceparent = "nonsense", tracestate = "a=1" }))
    assert.is_nil(trace.of(message { traceparent = { 1 } }))
    assert.is_nil(trace.of(message { tracestate = "a=1" }))
  end)

  it("passes on a tracestate of bounded size, and no binary one", function()
    local function state(text) return trace.of(message { traceparent = PARENT, tracestate = text }).tracestate end
    local entry = "k=" .. ("v"):rep(98)
    local long = ("%s,"):rep(7):format(entry, entry, entry, entry, entry, entry, entry):sub(1, -2)
    assert.equal(5 * 101 - 1, #state(long))
    assert.equal(long:sub(1, 5 * 101 - 1), state(long))
    assert.is_nil(state(("v"):rep(1000)))
    assert.is_nil(state "")
    assert.is_nil(state "a=\0")
    assert.is_nil(state "a=\r\nb")
    assert.is_nil(state(17))
  end)
end)

describe("an app's handlers", function()
  local function bench(consumer, app)
    consumer.queue = "work"
    app = app or {}
    app.name, app.queues, app.consumers = "shop", { work = {} }, { consumer }
    return testing.new(mr.app(app))
  end

  local function sent(b, i)
    local headers = b.published[i or 1].headers
    return headers.traceparent, headers.tracestate
  end

  local headers = { traceparent = PARENT, tracestate = "a=1" }

  local function is_child(text)
    local parsed = assert(trace.parse(text), tostring(text))
    assert.equal(TRACE, parsed.trace_id)
    assert.not_equal("00f067aa0ba902b7", parsed.parent_id)
  end

  it("pass the trace on with what they publish and forward, under one parent id", function()
    local mine
    local b = bench { handler = function(msg, app)
      mine = msg:trace()
      assert(app:publish("mail", { routing_key = "mails", headers = { a = 1 } }))
      assert(app:forward(msg, "audit"))
    end }
    b:deliver("work", "x", { headers = headers })
    is_child((sent(b)))
    assert.same({ mine.traceparent, "a=1" }, { sent(b) })
    assert.same({ mine.traceparent, "a=1" }, { sent(b, 2) })
    assert.equal(1, b.published[1].headers.a)
  end)

  it("pass it on by routes", function()
    local b = bench { route = mr.route.all {
      mr.route.when(function() return true end, mr.route.forward("audit")),
      mr.route.when(function() return true end, mr.route.publish("mails", "new", function() return "m" end)),
    } }
    b:deliver("work", "x", { headers = headers })
    is_child((sent(b)))
    assert.equal(sent(b), (sent(b, 2)))
  end)

  it("set their own, and it stays", function()
    local own = { headers = { traceparent = "mine" } }
    local b = bench { handler = function(msg, app)
      assert(app:publish("mail", own))
      assert(app:forward(msg, "audit", nil, { set = { traceparent = "mine" } }))
      assert(app:forward(msg, "audit", nil, { remove = { "traceparent" } }))
    end }
    b:deliver("work", "x", { headers = headers })
    assert.same({ "mine" }, { sent(b) })
    assert.equal("mine", (sent(b, 2)))
    assert.is_nil((sent(b, 3)))
    assert.same({ headers = { traceparent = "mine" } }, own)
  end)

  it("change nothing in the tables that they are given", function()
    local opts, set = { headers = { a = 1 } }, { b = 2 }
    local b = bench { handler = function(msg, app)
      assert(app:publish("mail", opts))
      assert(app:forward(msg, "audit", nil, { set = set }))
    end }
    b:deliver("work", "x", { headers = headers })
    assert.same({ headers = { a = 1 } }, opts)
    assert.same({ b = 2 }, set)
    is_child((sent(b, 2)))
  end)

  it("publish without one where the message has none, or nonsense", function()
    local b = bench { handler = function(msg, app)
      assert(app:publish("mail", {}))
      assert(app:forward(msg, "audit"))
      assert(app:publish "mail")
    end }
    b:deliver("work", "x", { headers = { traceparent = "00-nonsense", tracestate = "a=1" } })
    assert.is_nil((sent(b)))
    assert.equal("00-nonsense", (sent(b, 2))) -- what is forwarded stays as it came
    b:deliver("work", "x")
    for i = 4, 6 do assert.is_nil((sent(b, i))) end
  end)

  it("keep traces of messages that are handled side by side apart", function()
    local b = bench { handler = function(msg, app)
      mr.sleep(tonumber(msg.body))
      assert(app:publish(msg.body))
    end }
    b:deliver("work", "1", { headers = { traceparent = "00-" .. ("1"):rep(32) .. "-00f067aa0ba902b7-01" } })
    b:deliver("work", "2", { headers = { traceparent = "00-" .. ("2"):rep(32) .. "-00f067aa0ba902b7-01" } })
    b:deliver("work", "3")
    b:advance(10)
    assert.equal(("1"):rep(32), trace.parse((sent(b, 1))).trace_id)
    assert.equal(("2"):rep(32), trace.parse((sent(b, 2))).trace_id)
    assert.is_nil((sent(b, 3)))
  end)

  it("leave it to tasks of their own, which have no message", function()
    local b = bench { handler = function(msg, app)
      local mine = msg:trace()
      mr.spawn(function()
        app:publish "a"
        app:publish("b", { headers = mine })
      end)
      mr.sleep(1)
    end }
    b:deliver("work", "x", { headers = headers })
    b:advance(2)
    assert.is_nil((sent(b)))
    is_child((sent(b, 2)))
  end)

  it("leave it to themselves in a batch, which has many", function()
    local b = bench { batch = { size = 2, wait = 1 }, handler = function(list, app)
      app:publish "a"
      app:publish("b", { headers = list[2]:trace() })
    end }
    b:deliver("work", "x", { headers = headers })
    b:deliver("work", "y", { headers = headers })
    assert.is_nil((sent(b)))
    is_child((sent(b, 2)))
  end)

  it("leave headers alone with trace = false", function()
    local b = bench({ handler = function(msg, app)
      assert(app:publish "mail")
      assert(app:forward(msg, "audit"))
    end }, { trace = false })
    b:deliver("work", "x", { headers = headers })
    assert.is_nil((sent(b)))
    assert.equal(PARENT, (sent(b, 2)))
    assert.has_error(function() bench({ handler = print }, { trace = "no" }) end)
  end)

  it("fail, and the copies keep the message's own trace", function()
    local seen = {}
    local b = bench { retry = mr.retry.constant { delay = 10, attempts = 2 }, handler = function(msg)
      seen[#seen + 1] = msg.headers.traceparent
      return nil, "no"
    end }
    b:deliver("work", "x", { headers = headers })
    b:advance(60)
    assert.same({ PARENT, PARENT }, seen)
    assert.equal(PARENT, b.dead_letters[1].headers.traceparent)
    assert.equal("a=1", b.dead_letters[1].headers.tracestate)
  end)

  it("write it into their logs, when it is one", function()
    local fields
    local b = bench { handler = function(msg) fields = mr.log.of(msg) end }
    b:deliver("work", "x", { headers = headers })
    assert.equal(PARENT, fields.traceparent)
    b:deliver("work", "x", { headers = { traceparent = ("x"):rep(100000) } })
    assert.is_nil(fields.traceparent)
  end)
end)
