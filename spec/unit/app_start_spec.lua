-- Starting an app, where it throws.
local mr = require "moonrabbit"
local journal = require "moonrabbit.life.journal"

local function app()
  return mr.app { name = "x", queues = { q = {} }, consumers = { { queue = "q", handler = print } } }
end

local function connection(fields)
  local all = { channel = function() end, consume = function() end, on = function() end }
  for name, value in pairs(fields or {}) do all[name] = value end
  return all
end

describe("a start that throws", function()
  it("leaves the app stopped, to be started again", function()
    local one, tries = app(), 0
    local bad = connection { channel = function()
      tries = tries + 1
      error("boom", 0)
    end }
    for i = 1, 2 do
      local ok, err = pcall(one.start, one, { consume = bad, publish = connection() })
      assert.is_false(ok)
      assert.equal("boom", err)
      assert.equal("stopped", one.state)
      assert.equal(i, tries)
    end
  end)

  it("says where, when what it was given is wrong, and changes nothing", function()
    local one = app()
    local same = connection()
    for _, where in ipairs {
      same, { consume = same, publish = same }, { consume = same }, { usr = "x" },
      { uri = "amqp://x", endpoints = { "amqp://y" } },
    } do
      local ok, err = pcall(function() one:start(where) end)
      assert.is_false(ok)
      assert.truthy(err:find("app_start_spec.lua:", 1, true), err)
      assert.equal("ready", one.state)
    end
  end)
end)

local parent = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"

describe("the journal", function()
  local message = {
    exchange = "x.home", routing_key = "q", body = "body", properties = { message_id = "17" },
    headers = { ["moonrabbit-exchange"] = "orders", ["moonrabbit-key"] = "order.eu", traceparent = parent },
  }

  it("has a line for what is out of the ordinary, about the message, and passes everything on", function()
    local lines, heard = {}, {}
    local observer = journal.observer(function(level, text, fields) lines[#lines + 1] = { level, text, fields } end, {
      settled = function(...) heard[#heard + 1] = select("#", ...) end,
      delivered = function() heard.delivered = true end,
    })
    local failure = { message = "boom", kind = "error", attempt = 2, traceback = "trace" }
    observer.delivered("q", message)
    observer.settled("q", "ok", 0, nil, message)
    assert.equal(0, #lines)
    observer.failed("q", failure, message)
    observer.settled("q", "retry", 0, 5, message, failure)
    observer.settled("q", "dead_letter", 0, "boom", message, failure)
    observer.settled("q", "requeue", 0, "stopping", message)
    observer.settled("q", "duplicate", 0, nil, message)
    observer.settled("q", "drop", 0, nil, message)
    assert.is_true(heard.delivered)
    assert.equal(6, #heard)
    local texts = {}
    for i, line in ipairs(lines) do
      texts[i] = line[1] .. " " .. line[2]
      assert.equal("17", line[3].message_id)
      assert.equal("orders", line[3].exchange)
      assert.equal("order.eu", line[3].routing_key)
      assert.equal(parent, line[3].traceparent)
    end
    assert.same({
      "debug a run failed: boom", "warn a message failed, and is tried again in 5 s: boom", "error a dead letter: boom",
      "debug a message goes back to its queue: stopping", "debug a duplicate was acked", "debug a message was dropped",
    }, texts)
    assert.equal("trace", lines[1][3].traceback)
    assert.equal(2, lines[2][3].attempt)
  end)
end)
