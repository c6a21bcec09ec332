local net = require "moonrabbit.net"
local native = require "moonrabbit.runtime.native"
local notify = require "moonrabbit.life.notify"
local process = require "support.process"

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

describe("a line to a child process", function()
  local function read(stream)
    while true do
      local bytes, why = stream:read(100)
      if bytes or why ~= "again" then return bytes, why end
      native.sleep(0.005)
    end
  end

  it("goes both ways, over descriptor 3, and ends with the child", function()
    local pid, line = net.spawn({ "sh", "-c", "read x <&3; echo \"got $x\" >&3" }, true)
    assert.truthy(pid, line)
    line:write "word\n"
    assert.equal("got word\n", read(line))
    assert.same({ nil, "closed" }, { read(line) })
    assert.equal(0, ended(pid))
    line:close()
  end)

  it("is no child's that is started without", function()
    assert.equal(0, ended(assert(net.spawn { "sh", "-c", "! true 2> /dev/null >&3" })))
    local pid, line = net.spawn({ "moonrabbit-no-such-program" }, true)
    assert.is_nil(pid)
    assert.equal("string", type(line))
  end)

  it("is not there where nobody has spawned this process with one", function()
    local out = process.run({ "-e", "print(require('moonrabbit.net').parent())" }).out
    assert.equal("nil\t", out:sub(1, 4))
  end)
end)

describe("words on a line", function()
  local Line = require "moonrabbit.life.line"

  -- What a transport reads; what is written is kept.
  local function pair(pieces)
    local written = {}
    return Line.new(native, {
      read = function() return table.remove(pieces, 1) end,
      write = function(_, bytes)
        written[#written + 1] = bytes
        return true
      end,
      close = function() end,
    }), written
  end

  it("come as they were sent, however they are torn", function()
    local line, written = pair { "page 5\nab", "", "c\nd", "hello 0\npa", "ge 0\n" }
    assert.same({ "page", "abc\nd" }, { line:receive() })
    assert.same({ "hello", "" }, { line:receive() })
    assert.same({ "page", "" }, { line:receive() })
    assert.is_nil(line:receive())
    assert.is_false(line.open)
    line:send "late"
    assert.same({}, written)
  end)

  it("end on nonsense", function()
    for _, text in ipairs { "page 99999999999\n", "page 5\nabc" } do
      local line = pair { text }
      assert.is_nil(line:receive())
    end
  end)

  it("are answered, or not in time", function()
    local line, written = pair { "page 3\nabc" }
    local answer
    native.run(function()
      native.spawn(function() answer = line:ask("page", 5) end)
      native.sleep(0)
      line:receive()
      native.sleep(0)
    end)
    assert.equal("abc", answer)
    assert.same({ "page 0\n" }, written)
    assert.is_nil(line:ask("page", 0))
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
