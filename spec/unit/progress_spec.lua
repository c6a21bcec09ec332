-- The line that tells how far long work is: on a terminal, which `script` makes here, and nowhere else.
local process = require "support.process"

-- Four seconds of work by a clock of its own.
local PROGRAM = [[
  require "moonrabbit.cli.output".configure { quiet = %s }
  local time = 0
  local bar = require "moonrabbit.cli.progress".new("confirmed", %s, function() return time end)
  for _, moment in ipairs { { 0.5, 10 }, { 2, 500 }, { 2.05, 501 }, { 4, 900 } } do
    time = moment[1]
    bar:update(moment[2])
  end
  bar:finish()
  io.stdout:write "done\n"
]]

local function with_program(quiet, total, fn)
  local path = process.file(PROGRAM:format(quiet, total))
  local result = fn(path)
  os.remove(path)
  assert.equal(0, result.code, result.out .. result.err)
  return result
end

local function on_a_terminal(quiet, total)
  return with_program(quiet, total, function(path)
    return process.run({ "script", "-qec", process.command { path }, "/dev/null" }, { raw = true })
  end).out
end

describe("progress", function()
  it("is one line on a terminal, not in the first second, ten times a second at most, and goes away", function()
    local out = on_a_terminal("false", "1000")
    assert.equal("\r\27[Kconfirmed 500 of 1000 (50%), 250/s, 2 s, 2 s left"
      .. "\r\27[Kconfirmed 900 of 1000 (90%), 225/s, 4 s, 0 s left\r\27[Kdone\r\n", out)
  end)

  it("says what there is to say without a total", function()
    assert.truthy(on_a_terminal("false", "nil"):find("\r\27[Kconfirmed 500, 250/s, 2 s\r\27[K", 1, true))
  end)

  it("is not there with --quiet, nor where stderr is no terminal", function()
    assert.equal("done\r\n", on_a_terminal("true", "1000"))
    local elsewhere = with_program("false", "1000", function(path) return process.run { path } end)
    assert.equal("done\n", elsewhere.out)
    assert.equal("", elsewhere.err)
  end)
end)
