local net = require "moonrabbit.net"
local native = require "moonrabbit.runtime.native"
local notify = require "moonrabbit.life.notify"

local function ended(pid)
  local code, err = net.wait(pid)
  while code == nil and err == nil do
    native.sleep(0.005)
    code, err = net.wait(pid)
  end
  return code, err
end

describe("child processes", function()
  it("have exit codes, or died of a signal", function()
    assert.equal(3, ended(assert(net.spawn { "sh", "-c", "exit 3" })))
    assert.equal(0, ended(assert(net.spawn { "true" })))
    local pid = assert(net.spawn { "sleep", "60" })
    assert.is_nil(net.wait(pid))
    assert(net.kill(pid, "TERM"))
    assert.equal(143, ended(pid))
    pid = assert(net.spawn { "sleep", "60" })
    assert(net.kill(pid, "KILL"))
    assert.equal(137, ended(pid))
  end)

  it("take arguments as they are", function()
    assert.equal(7, ended(assert(net.spawn { "sh", "-c", "test \"$1\" = 'a b\"$c' && exit 7", "sh", "a b\"$c" })))
  end)

  it("are not there when there is no such program", function()
    local pid, err = net.spawn { "moonrabbit-no-such-program" }
    assert.is_nil(pid)
    assert.truthy(err:find "No such file")
  end)

  it("are nobody's but ours", function()
    local code, err = net.wait(1)
    assert.is_nil(code)
    assert.equal("string", type(err))
    for _, bad in ipairs { 0, -1 } do
      assert.has_error(function() net.kill(bad, "TERM") end)
      assert.has_error(function() net.wait(bad) end)
    end
    assert.has_error(function() net.kill(net.pid(), "NOPE") end)
    assert.has_error(function() net.spawn {} end)
    assert.has_error(function() net.spawn { "sh", 4 } end)
    assert.has_error(function() net.spawn { "sh", "a\0b" } end)
  end)
end)

describe("datagrams", function()
  it("to nobody are an error", function()
    for _, path in ipairs { "/nowhere/notify", "@moonrabbit-nobody", ("/x"):rep(100), "" } do
      local ok, err = net.datagram(path, "READY=1")
      assert.is_nil(ok)
      assert.equal("string", type(err))
    end
  end)

  it("are not sent where systemd does not listen", function()
    notify.send "READY=1"
    notify.reloading()
    assert.is_nil(notify.watchdog())
  end)
end)
