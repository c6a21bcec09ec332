-- connection.blocked: a broker that is short of memory.
local moonrabbit = require "moonrabbit"
local broker = require "support.broker"
local native = require "moonrabbit.runtime.native"
local process = require "support.process"
local ok = broker.ok

describe("a blocked connection", function()
  if not broker.url or not broker.name then pending "needs a broker of our own" return end

  local watermark = "0.4"

  -- While rabbitmqctl starts, which takes longer than two heartbeats where the machine is busy, the loop goes on.
  local function set_watermark(value)
    local ctl = process.start({ "scripts/broker", "ctl", "--name", broker.name, "set_vm_memory_high_watermark", value },
      { raw = true, timeout = 60 })
    local code, said = broker.eventually(function() return ctl:code() end, 80, "rabbitmqctl has ended"), ctl:err()
    ctl:stop()
    assert.equal(0, code, said)
  end

  after_each(function()
    broker.ctl("set_vm_memory_high_watermark", watermark)
    broker.close_all()
  end)

  it("pauses publishers until their timeout, and goes on when it is unblocked", function()
    local conn = broker.connect { heartbeat = 2 }
    local other = broker.connect()
    local ch = ok(conn:channel { confirm = true })
    local queue = ok(ok(other:channel()):queue_declare("", { exclusive = true })).queue
    queue = ok(ch:queue_declare(broker.unique "q", { auto_delete = true })).queue or queue
    local events = {}
    conn:on("blocked", function(reason) events[#events + 1] = reason end)
    conn:on("unblocked", function() events[#events + 1] = "unblocked" end)
    set_watermark "0.00001"
    -- The broker says so to a connection when that publishes, and may take some before it knows itself.
    local taken = 0
    broker.eventually(function()
      if conn:blocked() then return true end
      if ch:publish_async("first", { routing_key = queue }) then taken = taken + 1 end
    end, 10, "blocked")
    local started = native.now()
    local sent, err = ch:publish("second", { routing_key = queue, timeout = 0.3 })
    assert.is_nil(sent)
    assert.equal("blocked", err.kind)
    assert.is_true(err.temporary)
    assert.truthy(native.now() - started >= 0.29 and native.now() - started < 3)
    sent, err = ch:publish_async("third", { routing_key = queue, timeout = 0 })
    assert.is_nil(sent)
    assert.equal("blocked", err.kind)
    -- A connection that does not publish works on.
    ok(ok(other:channel()):queue_declare("", { exclusive = true }))
    local later = {}
    moonrabbit.run(function()
      for i = 1, 3 do
        moonrabbit.spawn(function() later[i] = { ch:publish("later" .. i, { routing_key = queue, timeout = 30 }) } end)
      end
      moonrabbit.sleep(5) -- heartbeats hold meanwhile
      assert.is_true(conn:is_open())
      assert.equal(0, #later)
      set_watermark(watermark)
      broker.eventually(function() return #later == 3 end, 20)
    end)
    for i = 1, 3 do assert.is_true(later[i][1], tostring(later[i][2])) end
    broker.eventually(function() return events[2] end)
    assert.matches("memory", events[1])
    assert.equal("unblocked", events[2])
    assert.is_nil(conn:blocked())
    assert.is_true(ch:wait_for_confirms(10))
    assert.equal(taken + 3, ok(ch:queue_declare(queue, { passive = true })).message_count)
    ok(ch:queue_delete(queue))
  end)
end)
