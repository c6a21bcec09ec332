-- Who waits for which confirmation, on an engine in memory and a clock that stands still.
local fake = require "support.fake_broker"
local virtual = require "support.virtual"
local Waiters = require "moonrabbit.channel.waiters"

describe("those who wait for confirmations #smoke", function()
  local b, channel, runtime, waiters, woken

  before_each(function()
    b = fake.new():open()
    channel, runtime, woken = b:channel(true), virtual.new(), {}
    waiters = Waiters.new(runtime)
  end)

  local function publish()
    if channel:unconfirmed() % 100 == 0 then b:sent() end
    return (assert(channel:publish "x"))
  end

  -- A task that waits for the next publish, which is number n of the channel.
  local function wait(n)
    local waiter = waiters:join(publish(), true)
    runtime.run(function()
      waiter.condition:wait()
      waiters:leave(waiter)
      woken[#woken + 1] = n
    end)
  end

  local function ack(n)
    b:send(fake.ack(1, n))
    waiters:wake()
    runtime.settle()
  end

  local function places()
    local n = 0
    for _ in pairs(waiters._order) do n = n + 1 end
    return n
  end

  it("cost no more with each batch while one of them stays", function()
    waiters:stay(publish())
    for n = 2, 5000 do
      wait(n)
      ack(n)
      assert.equal(n, woken[n - 1])
      assert.equal(1, waiters.count)
    end
    assert.is_true(places() < 200)
    assert.is_true(waiters._tail - waiters._head < 200)
  end)

  it("are woken all the same where places were taken out, in whatever order that is", function()
    local stay = {}
    for n = 1, 1000 do
      wait(n)
      if n % 50 == 0 then stay[#stay + 1] = n else ack(n) end
    end
    assert.equal(980, #woken)
    assert.equal(20, waiters.count)
    woken = {}
    for i = 20, 1, -1 do ack(stay[i]) end
    assert.same({ 1000, 950, 900 }, { woken[1], woken[2], woken[3] })
    assert.equal(20, #woken)
    assert.equal(0, waiters.count)
    wait(1001)
    ack(1001)
    assert.equal(1001, woken[21])
  end)

  it("are all looked at a moment later, also after a time without a task for that", function()
    for n = 1, 600 do wait(n) end
    local spawn = runtime.spawn
    b:send(fake.ack(1, 600))
    function runtime.spawn() error("no task", 0) end
    assert.is_false((pcall(waiters.wake, waiters)))
    runtime.spawn = spawn
    waiters:wake()
    runtime.settle()
    assert.same({}, woken)
    runtime.advance(1)
    assert.same({ 600 }, woken)
  end)
end)
